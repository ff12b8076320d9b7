"""Looking at a client's update before it may count: names, shapes, number format, finite values, size.

Then at all updates of a round beside each other: what is far from the rest is held down, and named.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median_high, median_low

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedrag_cli.config.fields import METRIC_UNBOUNDED
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import FederationError
from fedrag_cli.federated.config import traits_of
from fedrag_cli.federated.messages import EXAMPLES, STRATEGY_LOSS, VALIDATION_EXAMPLES
from fedrag_cli.federated.privacy import clip_scale, largest_noisy_norm
from fedrag_cli.federated.weights import Manifest, MisdescribedArrayError, blocks_of, joined
from fedrag_cli.text import printable, shape_text

MOST_EXAMPLES = 2**40
LARGEST_METRIC = 1e12
LARGEST_LOSS = 1e6
# No training moves a model so far, and the squares that strategies take of it are within float32.
LARGEST_NORM = 1e12
ROUNDING = 1e-6
# Of two, nobody can tell which one is far off.
FEWEST_FOR_NORMS = 3
LONGEST_REASON = 300


class RefusedUpdateError(Exception):
    """An update that may not count; the message says why, in the server's own words and fit for a screen."""

    def __init__(self, reason: str) -> None:
        """Keep the reason, which may quote what a client has sent."""
        super().__init__(printable(reason, LONGEST_REASON))


@dataclass(frozen=True)
class Update:
    """A client's update that passed."""

    arrays: dict[str, Array]
    """In the order of the manifest, as they came and wherever they lie."""
    examples: int
    metrics: dict[str, float]
    """Finite, and of the agreed names only."""
    norm: float
    """L2 norm of the trained weights minus the global ones."""
    base: Mapping[str, Array] = field(default_factory=dict)
    """The global weights; empty where they are not needed, because the arrays are weights that count in full."""
    is_change: bool = False
    """Whether the arrays are what is to be added to the base, and not the trained weights."""
    scale: float = 1.0
    """What the difference to the base is multiplied by, in (0, 1]; see `clip_scale`."""
    counts_alike: bool = False
    """Whether all updates count the same, however many examples they have."""
    strategy_loss: float | None = None
    """The loss that strategies weigh by; the reported one unless that is far off."""

    @property
    def weight(self) -> int:
        """How much the update counts beside others."""
        return 1 if self.counts_alike else self.examples

    def blocks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Yield the trained weights of a tensor, a block at a time; see `blocks_of`."""
        if not self.base:
            yield from blocks_of(self.arrays[name])
            return
        for before, values in zip(blocks_of(self.base[name]), blocks_of(self.arrays[name]), strict=True):
            change = values if self.is_change else values - before
            yield before + np.float32(self.scale) * change

    def tensor(self, name: str) -> Tensor:
        """Return the trained weights of one tensor, whole."""
        return torch.from_numpy(joined(self.blocks(name), self.arrays[name].shape))

    def content(self) -> RecordDict:
        """Return the update as strategies take it, with all its weights in memory as float32."""
        loss = self.metrics.get("loss", 0.0) if self.strategy_loss is None else self.strategy_loss
        metrics: dict[str, int | float] = {EXAMPLES: self.weight, STRATEGY_LOSS: loss}
        arrays = ArrayRecord(
            {name: Array(joined(self.blocks(name), array.shape)) for name, array in self.arrays.items()}
        )
        return RecordDict({"arrays": arrays, "metrics": MetricRecord(dict(metrics))})


def screen_update(
    content: RecordDict, manifest: Manifest, reference: Mapping[str, Array], settings: FederatedConfig
) -> Update:
    """Check what a client sent against what was agreed on and the round's global weights.

    As float16 comes what training has changed, see `update_to_wire`. Under privacy all updates count the same, and the
    server clips them, if that is not the clients' part.

    Raises:
        RefusedUpdateError: The update may not count.
    """
    arrays = _described_arrays(content, manifest, settings.transport_dtype)
    is_change = settings.transport_dtype != "float32"
    norm = math.sqrt(
        sum(_squared_norm(name, array, None if is_change else reference[name]) for name, array in arrays.items())
    )
    _check_norm(norm, manifest, settings)
    examples, reported = read_metrics(content, settings.metrics)
    if examples < 1:
        raise RefusedUpdateError("it reports no training example")
    privacy = settings.privacy
    scale = clip_scale(norm, privacy.clipping_norm) if privacy is not None and privacy.at == "server" else 1.0
    base = reference if is_change or scale < 1 else {}
    return Update(arrays, examples, reported, norm, base, is_change, scale, counts_alike=privacy is not None)


def bound_updates(
    updates: Mapping[str, Update], reference: Mapping[str, Array], settings: FederatedConfig, strategy: object
) -> tuple[dict[str, Update], dict[str, str]]:
    """Hold down what is far from the rest of a round, so that no single client makes the next global weights.

    Numbers of examples and losses are compared with the lower median, which is an honest client's as long as fewer than
    half of the clients are hostile. Norms are compared from three updates on: of two, one that sends nothing would
    silence the other. Under privacy they are not, because the bound would tell about other sites' updates.

    Returns:
        The updates, and in words what was held down, by client.
    """
    traits, bounded, outliers = traits_of(strategy), dict(updates), {name: list[str]() for name in updates}
    ratio = settings.max_weight_ratio
    counts = bound_counts({name: update.examples for name, update in updates.items()}, ratio)
    for name, count in counts.items():
        outliers[name].append(f"its {updates[name].examples} examples count as {count}")
        bounded[name] = dataclasses.replace(bounded[name], examples=count)
    reports = {name: update.metrics for name, update in updates.items()}
    for name, (metrics, reason) in bound_validation_examples(reports, ratio).items():
        outliers[name].append(reason)
        bounded[name] = dataclasses.replace(bounded[name], metrics=metrics)
    losses = [update.metrics["loss"] for update in updates.values() if "loss" in update.metrics]
    if ratio is not None and losses and traits.weighs_losses:
        low, high = median_high(losses) / ratio, median_low(losses) * ratio or math.inf
        for name, update in bounded.items():
            reported = update.metrics.get("loss", 0.0)
            loss = min(max(reported, low), high)
            if loss != reported:
                outliers[name].append(f"its loss {reported:.4g} counts as {loss:.4g}")
                bounded[name] = dataclasses.replace(update, strategy_loss=loss)
    compares_norms = settings.privacy is None and not traits.is_robust and len(updates) >= FEWEST_FOR_NORMS
    if settings.max_norm_ratio is not None and compares_norms:
        bound = settings.max_norm_ratio * median_low(update.norm for update in updates.values())
        for name, update in bounded.items():
            if 0 < bound < update.norm:
                outliers[name].append(f"its norm {update.norm:.4g} is scaled down to {bound:.4g}")
                bounded[name] = dataclasses.replace(update, base=reference, scale=bound / update.norm)
    return bounded, {name: "; ".join(reasons) for name, reasons in sorted(outliers.items()) if reasons}


def require_quorum(
    number: int, updates: Sized, refused: Mapping[str, str], settings: FederatedConfig, hint: str
) -> None:
    """Raise FederationError where a round has fewer usable updates than the quorum."""
    if len(updates) < settings.min_clients:
        reasons = "".join(f"; {name}: {reason}" for name, reason in refused.items())
        needed = f"Round {number} has {len(updates)} usable updates, but needs {settings.min_clients}"
        raise FederationError(f"{needed}{reasons}.", hint)


def screen_measurements(
    contents: Mapping[str, RecordDict],
    names: Sequence[str],
    settings: FederatedConfig,
    note: Callable[[str, str], None],
) -> dict[str, tuple[int, dict[str, float]]]:
    """Return what clients measured on validation examples of their own: for how many it counts, and the metrics.

    A note tells of each client whose measurement is refused or counts for less, and why.
    """
    measured: dict[str, tuple[int, dict[str, float]]] = {}
    for client, content in contents.items():
        try:
            examples, metrics = read_metrics(content, names)
        except RefusedUpdateError as refusal:
            note(client, f"refused: {refusal}")
            continue
        metrics.pop(VALIDATION_EXAMPLES, None)
        if examples and metrics:
            measured[client] = examples, metrics
    counts = {client: examples for client, (examples, _) in measured.items()}
    for client, most in bound_counts(counts, settings.max_weight_ratio).items():
        note(client, f"is an outlier: its {counts[client]} validation examples count as {most}")
        measured[client] = most, measured[client][1]
    return measured


def bound_counts(counts: Mapping[str, int], ratio: float | None) -> dict[str, int]:
    """Return what numbers count as that are above so many times their lower median, by the same names."""
    if ratio is None or not counts:
        return {}
    most = int(ratio * median_low(counts.values()))
    return {name: most for name, count in counts.items() if count > most}


def bound_validation_examples(
    reports: Mapping[str, Mapping[str, float]], ratio: float | None
) -> dict[str, tuple[dict[str, float], str]]:
    """Return the metrics of clients whose numbers of validation examples are too large, with smaller ones, and why."""
    known = {
        name: int(report[VALIDATION_EXAMPLES]) for name, report in reports.items() if VALIDATION_EXAMPLES in report
    }
    return {
        name: (
            {**reports[name], VALIDATION_EXAMPLES: float(most)},
            f"its {known[name]} validation examples count as {most}",
        )
        for name, most in bound_counts(known, ratio).items()
    }


def read_metrics(content: RecordDict, metrics: Sequence[str]) -> tuple[int, dict[str, float]]:
    """Return a reply's number of examples and the agreed metrics in it; what else it holds is left out.

    Raises:
        RefusedUpdateError: There are no metrics, or one is not finite or not within its range.
    """
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise RefusedUpdateError("it has no metrics")
    examples = records[0].get(EXAMPLES)
    if type(examples) is not int or not 0 <= examples <= MOST_EXAMPLES:
        raise RefusedUpdateError("its number of examples is no whole number, or too large")
    reported: dict[str, float] = {}
    for name in metrics:
        value = records[0].get(name)
        if value is not None:
            reported[name] = _within_range(name, value)
    measured = records[0].get(VALIDATION_EXAMPLES)
    if measured is not None:
        if type(measured) is not int or not 0 < measured <= MOST_EXAMPLES:
            raise RefusedUpdateError("its number of validation examples is no whole number, or too large")
        reported[VALIDATION_EXAMPLES] = float(measured)
    return examples, reported


def _within_range(name: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST_METRIC:  # type: ignore[arg-type]
        raise RefusedUpdateError(f"its {name} is not finite")
    low, high = 0.0, 1.0
    if name == "loss" or name.endswith("_loss") or name == "negative_log_likelihood":
        high = LARGEST_LOSS
    elif name in ("steps", "seconds") or name in METRIC_UNBOUNDED:
        high = LARGEST_METRIC
    if not low - ROUNDING <= value <= high + ROUNDING:  # type: ignore[operator]
        raise RefusedUpdateError(f"its {name} {printable(value, 20)} is not between {low:g} and {high:g}")
    return min(max(float(value), low), high)  # type: ignore[arg-type]


def _check_norm(norm: float, manifest: Manifest, settings: FederatedConfig) -> None:
    if settings.max_update_norm is not None and norm > settings.max_update_norm:
        raise RefusedUpdateError(f"its norm {norm:.4g} is above the bound {settings.max_update_norm:g}")
    if norm > LARGEST_NORM:
        raise RefusedUpdateError(f"its norm {norm:.4g} is beyond any training")
    privacy = settings.privacy
    if privacy is not None and privacy.at == "client":
        numbers = sum(math.prod(shape) for shape in manifest.values())
        most = largest_noisy_norm(privacy, settings.min_clients, numbers)
        if norm > most:
            raise RefusedUpdateError(f"its norm {norm:.4g} is more than clipping and noise leave ({most:.4g})")


def _described_arrays(content: RecordDict, manifest: Manifest, agreed: str) -> dict[str, Array]:
    """Return the arrays, whose bytes were not looked at yet, so that a false description costs nothing."""
    records = list(content.array_records.values())
    if len(records) != 1:
        raise RefusedUpdateError("it has no tensors")
    _check_names(records[0], manifest)
    for name, shape in manifest.items():
        array = records[0][name]
        # A shape of 2.0 or true equals one of 2 or 1, but nothing can be made of it.
        if list(array.shape) != shape or not all(type(size) is int for size in array.shape):
            raise RefusedUpdateError(f"{name} has the shape {shape_text(array.shape)}, not {shape_text(shape)}")
        if array.dtype != agreed:
            raise RefusedUpdateError(f"{name} is {printable(array.dtype, 20)}, not {agreed}")
    return {name: records[0][name] for name in manifest}


def _check_names(record: Mapping[str, Array], manifest: Manifest) -> None:
    missing = [name for name in manifest if name not in record]
    if missing:
        raise RefusedUpdateError(f"the tensor {missing[0]} is missing" + _more(missing))
    unknown = [name for name in record if name not in manifest]
    if unknown:
        raise RefusedUpdateError(f"it has {len(unknown)} tensors that were not agreed on")


def _squared_norm(name: str, array: Array, reference: Array | None) -> float:
    """Return the squared L2 norm of an array, or of its difference to another one.

    It is summed in float64, which no float32 overflows.
    """
    total = 0.0
    others: Iterable[NDArray[np.float32] | float] = blocks_of(reference) if reference is not None else repeat(0.0)
    for values, before in zip(_readable(name, blocks_of(array)), others, strict=False):
        if not bool(np.isfinite(values).all()):
            raise RefusedUpdateError(f"{name} holds values that are not finite")
        difference = values.astype(np.float64) - before
        total += float(np.dot(difference, difference))
    return total


def _readable(name: str, blocks: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    try:
        yield from blocks
    except MisdescribedArrayError as error:
        raise RefusedUpdateError(f"{name} is not what its header says") from error
    except OSError:
        raise
    except Exception as error:  # Whatever hostile bytes make numpy raise, the update is refused.
        raise RefusedUpdateError(f"{name} cannot be read") from error


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
