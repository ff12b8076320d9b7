"""Trained tensors on their way over the wire: float32, by name, and their manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedrag_cli.errors import ModelError
from fedrag_cli.runs.atomic import os_errors

Weights = dict[str, Tensor]
Manifest = dict[str, list[int]]
"""Names of the trained tensors, with their shapes; the order is that of the names."""
Arrays = dict[str, NDArray[np.float32]]


def to_wire(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as float32 arrays in the order of their names.

    bfloat16, which Flower's arrays cannot hold, and float16 become float32 without loss.
    """
    return ArrayRecord({name: Array(_float32(weights[name])) for name in sorted(weights)})


def from_wire(record: Mapping[str, Array]) -> Weights:
    """Return a record's arrays as float32 tensors that own their memory."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def to_arrays(weights: Mapping[str, Tensor]) -> Arrays:
    """Return tensors as float32 numpy arrays in the order of their names."""
    return {name: _float32(weights[name]) for name in sorted(weights)}


def manifest_of(weights: Mapping[str, Tensor]) -> Manifest:
    """Return names and shapes of tensors, in the order of their names."""
    return {name: list(weights[name].shape) for name in sorted(weights)}


def manifest_digest(manifest: Manifest) -> str:
    """Return a hash of names and shapes, of 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8).hexdigest()


def record_bytes(record: Mapping[str, Array]) -> int:
    """Return how many bytes the arrays of a record take on the wire."""
    return sum(len(array.data) for array in record.values())


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
    """Read tensors from a safetensors file.

    Raises:
        ModelError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}", "Restore the file, or start a new run.") from error


def _float32(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
