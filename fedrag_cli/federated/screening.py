"""Looking at a client's update before it may count: names, shapes, number format, finite values, size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedrag_cli.federated.weights import Arrays, Manifest

EXAMPLES = "num-examples"
VALIDATION_EXAMPLES = "validation-examples"
# The key under which QFedAvg looks for the loss.
STRATEGY_LOSS = "train_loss"
MOST_EXAMPLES = 2**40
LARGEST_METRIC = 1e12
NUMPY_FILE = b"\x93NUMPY"


class RefusedUpdateError(Exception):
    """An update that may not count; the message says why, in the server's own words."""


@dataclass(frozen=True)
class Update:
    """A client's update that passed.

    Args:
        arrays: Trained weights, by name, in the order of the manifest.
        examples: Number of training examples.
        metrics: Reported metrics, finite, of the agreed names only.
        norm: L2 norm of the trained weights minus the global ones.
    """

    arrays: Arrays
    examples: int
    metrics: dict[str, float]
    norm: float

    def content(self) -> RecordDict:
        """Return the update as strategies take it."""
        metrics: dict[str, int | float] = {EXAMPLES: self.examples, STRATEGY_LOSS: self.metrics.get("loss", 0.0)}
        arrays = ArrayRecord({name: Array(values) for name, values in self.arrays.items()})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord(dict(metrics))})


def screen_update(
    content: RecordDict,
    manifest: Manifest,
    reference: Arrays,
    *,
    metrics: Sequence[str] = (),
    max_norm: float | None = None,
) -> Update:
    """Check an update.

    Args:
        content: What the client sent.
        manifest: Names and shapes that were agreed on.
        reference: The global weights of this round.
        metrics: Names of the metrics that were agreed on.
        max_norm: Largest L2 norm of the difference to the global weights.

    Raises:
        RefusedUpdateError: The update may not count.
    """
    arrays = _checked_arrays(content, manifest)
    # The sum of squares over all tensors in float64: float32 would overflow for a hostile update.
    squares = [
        float(np.square(arrays[name].astype(np.float64) - reference[name].astype(np.float64)).sum())
        for name in manifest
    ]
    norm = math.sqrt(sum(squares))
    if max_norm is not None and norm > max_norm:
        raise RefusedUpdateError(f"its norm {norm:.4g} is above the bound {max_norm:g}")
    examples, reported = read_metrics(content, metrics)
    if examples < 1:
        raise RefusedUpdateError("it reports no training example")
    return Update(arrays, examples, reported, norm)


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


def _checked_arrays(content: RecordDict, manifest: Manifest) -> Arrays:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise RefusedUpdateError("it has no tensors")
    _check_names(records[0], manifest)
    arrays: Arrays = {}
    for name, shape in manifest.items():
        arrays[name] = _checked_array(name, records[0][name], shape)
    return arrays


def _check_names(record: Mapping[str, Array], manifest: Manifest) -> None:
    missing = [name for name in manifest if name not in record]
    if missing:
        raise RefusedUpdateError(f"the tensor {missing[0]} is missing" + _more(missing))
    unknown = [name for name in record if name not in manifest]
    if unknown:
        raise RefusedUpdateError(f"it has {len(unknown)} tensors that were not agreed on")


def _checked_array(name: str, array: Array, shape: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    # Looked at before the data are read, so that a false header costs nothing.
    if list(array.shape) != shape:
        raise RefusedUpdateError(f"{name} has the shape {tuple(array.shape)}, not {tuple(shape)}")
    if array.dtype != "float32":
        raise RefusedUpdateError(f"{name} is {array.dtype[:20]}, not float32")
    try:
        # numpy would also open archives.
        if bytes(array.data[: len(NUMPY_FILE)]) != NUMPY_FILE:
            raise ValueError("no numpy file")
        values = array.numpy()
    except Exception as error:  # Whatever hostile bytes make numpy raise, the update is refused.
        raise RefusedUpdateError(f"{name} cannot be read") from error
    if list(values.shape) != shape or values.dtype != np.float32:
        raise RefusedUpdateError(f"{name} is not what its header says")
    if not bool(np.isfinite(values).all()):
        raise RefusedUpdateError(f"{name} holds values that are not finite")
    return values


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
