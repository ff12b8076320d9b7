"""Looking at a client's update before it may count: names, shapes, number format, finite values, size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedrag_cli.config.schema import PrivacyConfig, TransportDtype
from fedrag_cli.federated.arrays import MisdescribedArrayError, blocks_of, joined
from fedrag_cli.federated.privacy import clip_scale
from fedrag_cli.federated.weights import Manifest

EXAMPLES = "num-examples"
VALIDATION_EXAMPLES = "validation-examples"
# The key under which QFedAvg looks for the loss.
STRATEGY_LOSS = "train_loss"
MOST_EXAMPLES = 2**40
LARGEST_METRIC = 1e12


class RefusedUpdateError(Exception):
    """An update that may not count; the message says why, in the server's own words."""


@dataclass(frozen=True)
class Update:
    """A client's update that passed.

    Args:
        arrays: Trained weights by name, in the order of the manifest, as they came and wherever they lie; or what
            training has changed, where there is a base.
        examples: Number of training examples.
        metrics: Reported metrics, finite, of the agreed names only.
        norm: L2 norm of the trained weights minus the global ones.
        base: The global weights; empty where they are not needed, because the arrays are weights that count in full.
        is_change: Whether the arrays are what is to be added to the base.
        scale: What the difference to the base is multiplied by, in (0, 1]; see `clip_scale`.
        counts_alike: Whether all updates count the same, however many examples they have.
    """

    arrays: dict[str, Array]
    examples: int
    metrics: dict[str, float]
    norm: float
    base: Mapping[str, Array] = field(default_factory=dict)
    is_change: bool = False
    scale: float = 1.0
    counts_alike: bool = False

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
        metrics: dict[str, int | float] = {EXAMPLES: self.weight, STRATEGY_LOSS: self.metrics.get("loss", 0.0)}
        arrays = ArrayRecord(
            {name: Array(joined(self.blocks(name), array.shape)) for name, array in self.arrays.items()}
        )
        return RecordDict({"arrays": arrays, "metrics": MetricRecord(dict(metrics))})


def screen_update(
    content: RecordDict,
    manifest: Manifest,
    reference: Mapping[str, Array],
    *,
    metrics: Sequence[str] = (),
    max_norm: float | None = None,
    dtype: TransportDtype = "float32",
    privacy: PrivacyConfig | None = None,
) -> Update:
    """Check an update.

    Args:
        content: What the client sent.
        manifest: Names and shapes that were agreed on.
        reference: The global weights of this round.
        metrics: Names of the metrics that were agreed on.
        max_norm: Largest L2 norm of the difference to the global weights.
        dtype: Number format that was agreed on; as float16 comes what training has changed, see `update_to_wire`.
        privacy: Under it all updates count the same, and the server clips them, if that is not the clients' part.

    Raises:
        RefusedUpdateError: The update may not count.
    """
    arrays = _described_arrays(content, manifest, dtype)
    is_change = dtype != "float32"
    norm = math.sqrt(
        sum(_squared_norm(name, array, None if is_change else reference[name]) for name, array in arrays.items())
    )
    if max_norm is not None and norm > max_norm:
        raise RefusedUpdateError(f"its norm {norm:.4g} is above the bound {max_norm:g}")
    examples, reported = read_metrics(content, metrics)
    if examples < 1:
        raise RefusedUpdateError("it reports no training example")
    scale = clip_scale(norm, privacy.clipping_norm) if privacy is not None and privacy.at == "server" else 1.0
    base = reference if is_change or scale < 1 else {}
    return Update(arrays, examples, reported, norm, base, is_change, scale, counts_alike=privacy is not None)


def read_metrics(content: RecordDict, metrics: Sequence[str]) -> tuple[int, dict[str, float]]:
    """Return a reply's number of examples and the agreed metrics in it; what else it holds is left out.

    Raises:
        RefusedUpdateError: There are no metrics, or one is not finite.
    """
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise RefusedUpdateError("it has no metrics")
    examples = records[0].get(EXAMPLES)
    if isinstance(examples, bool) or not isinstance(examples, int) or not 0 <= examples <= MOST_EXAMPLES:
        raise RefusedUpdateError("its number of examples is no whole number")
    reported: dict[str, float] = {}
    for name in metrics:
        value = records[0].get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or not abs(value) <= LARGEST_METRIC:
            raise RefusedUpdateError(f"its {name} is not finite")
        reported[name] = float(value)
    measured = records[0].get(VALIDATION_EXAMPLES)
    if measured is not None:
        if not isinstance(measured, int) or not 0 < measured <= MOST_EXAMPLES:
            raise RefusedUpdateError("its number of validation examples is no whole number")
        reported[VALIDATION_EXAMPLES] = float(measured)
    return examples, reported


def _described_arrays(content: RecordDict, manifest: Manifest, dtype: TransportDtype) -> dict[str, Array]:
    """Return the arrays, whose bytes were not looked at yet, so that a false description costs nothing."""
    records = list(content.array_records.values())
    if len(records) != 1:
        raise RefusedUpdateError("it has no tensors")
    _check_names(records[0], manifest)
    for name, shape in manifest.items():
        array = records[0][name]
        if list(array.shape) != shape:
            raise RefusedUpdateError(f"{name} has the shape {tuple(array.shape)}, not {tuple(shape)}")
        if array.dtype != dtype:
            raise RefusedUpdateError(f"{name} is {array.dtype[:20]}, not {dtype}")
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
