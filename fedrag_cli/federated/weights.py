"""Trained tensors on their way over the wire: float32 or float16, by name, and their manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrag_cli.config.schema import TransportDtype
from fedrag_cli.errors import FederationError, ModelError
from fedrag_cli.federated.arrays import whole
from fedrag_cli.runs.atomic import os_errors

Weights = dict[str, Tensor]
Manifest = dict[str, list[int]]
"""Names of the trained tensors, with their shapes; the order is that of the names."""
Arrays = dict[str, NDArray[np.float32]]
BYTES_OF: dict[TransportDtype, int] = {"float32": 4, "float16": 2}
LARGEST_FLOAT16 = 65504.0


def to_wire(weights: Mapping[str, Tensor], dtype: TransportDtype = "float32") -> ArrayRecord:
    """Return tensors as arrays of one number format in the order of their names.

    As float32, bfloat16 (which Flower's arrays cannot hold) and float16 lose nothing.

    Args:
        weights: Tensors by name.
        dtype: The number format in which they travel.

    Raises:
        FederationError: A value is too large for float16.
    """
    return ArrayRecord({name: Array(_encoded(name, _float32(weights[name]), dtype)) for name in sorted(weights)})


def update_to_wire(trained: Mapping[str, Tensor], received: Mapping[str, Tensor], dtype: TransportDtype) -> ArrayRecord:
    """Return what a client sends: its weights as float32, or what training has changed of them as float16.

    A step is often smaller than the precision of a float16 weight; as a difference it keeps 11 bits of its own.

    Args:
        trained: Tensors by name after training.
        received: The global weights that training began with.
        dtype: The number format in which they travel.

    Raises:
        FederationError: A difference is too large for float16.
    """
    if dtype == "float32":
        return to_wire(trained)
    changed = {name: torch.from_numpy(_float32(trained[name]) - _float32(received[name])) for name in trained}
    return to_wire(changed, dtype)


def move_to_wire(weights: Weights) -> ArrayRecord:
    """Do as `to_wire`, and empty the given dict meanwhile, so that the weights are in memory once."""
    record = ArrayRecord()
    for name in sorted(weights):
        record[name] = Array(_float32(weights.pop(name)))
    return record


def move_from_wire(record: ArrayRecord) -> Weights:
    """Do as `from_wire`, and empty the given record meanwhile, so that the weights are in memory once."""
    return {name: torch.from_numpy(whole(record.pop(name))) for name in list(record)}


def in_dtype(record: ArrayRecord, dtype: TransportDtype) -> ArrayRecord:
    """Return a record of float32 arrays in the number format in which they travel; see `to_wire`."""
    if dtype == "float32":
        return record
    return ArrayRecord({name: Array(_encoded(name, whole(array), dtype)) for name, array in record.items()})


def send_instead(messages: Iterable[Message], record: ArrayRecord) -> list[Message]:
    """Return messages with this record in place of the arrays that a strategy has put into them."""
    replaced = []
    for message in messages:
        for key in list(message.content.array_records):
            message.content[key] = record
        replaced.append(message)
    return replaced


def from_wire(record: Mapping[str, Array]) -> Weights:
    """Return a record's arrays as float32 tensors that own their memory."""
    return {name: torch.from_numpy(whole(array)) for name, array in record.items()}


def to_arrays(weights: Mapping[str, Tensor]) -> Arrays:
    """Return tensors as float32 numpy arrays in the order of their names."""
    return {name: _float32(weights[name]) for name in sorted(weights)}


def manifest_of(weights: Mapping[str, Tensor]) -> Manifest:
    """Return names and shapes of tensors, in the order of their names."""
    return {name: list(weights[name].shape) for name in sorted(weights)}


def record_digest(record: Mapping[str, Array]) -> str:
    """Return a hash of a record's names and values, of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(record):
        digest.update(name.encode())
        digest.update(record[name].data)
    return digest.hexdigest()


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, with its parent folders; the caller sees to atomicity."""
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


def load_weights(path: Path) -> Weights:
    """Read tensors from a safetensors file into memory of their own.

    Raises:
        ModelError: The file is missing or damaged.
    """
    weights: Weights = {}
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            # What an open file has given stays in memory a second time, so it is opened for each tensor.
            with safe_open(path, "pt") as file:
                weights[name] = file.get_tensor(name).clone()
        return weights
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}", "Restore the file, or start a new run.") from error


def _encoded(name: str, values: NDArray[Any], dtype: TransportDtype) -> NDArray[Any]:
    if dtype == "float32":
        return values.astype(np.float32, copy=False)
    if values.size and max(values.max(), -values.min()) > LARGEST_FLOAT16:
        raise FederationError(
            f"The tensor {name} holds values above {LARGEST_FLOAT16:g}, which float16 cannot carry.",
            "Set federated.transport_dtype to float32 on the server and on all clients.",
        )
    # Beside a value that is no number, of which the receiver tells, a large one may be left.
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _float32(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
