"""Trained tensors on their way over the wire: float32 or float16, by name, and reading them a block at a time."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrag_cli.config.schema import TransportDtype
from fedrag_cli.errors import FederationError, ModelError
from fedrag_cli.runs.files import os_errors
from fedrag_cli.text import printable, shape_text

Weights = dict[str, Tensor]
Manifest = dict[str, list[int]]
"""Names of the trained tensors, with their shapes; the order is that of the names."""
BYTES_OF: dict[TransportDtype, int] = {"float32": 4, "float16": 2}
LARGEST_FLOAT16 = 65504.0
BLOCK = 2**18
"""Numbers that are in memory at once."""
MOST_BYTES_OF_CALL = 2**20
# How Flower names the serialisation of the arrays that it makes.
NUMPY = Array(np.empty(0, np.float32)).stype


class MisdescribedArrayError(ValueError):
    """The bytes of an array are not what its description says."""


class ScratchFile:
    """A file without a name, for this process alone, that is gone with the object or with the process."""

    def __init__(self, directory: Path) -> None:
        """Make it on the disk of a folder, readable by the owner only; raises OSError."""
        self._descriptor, path = tempfile.mkstemp(dir=directory)
        Path(path).unlink()
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, data: bytes, offset: int) -> None:
        """Put bytes at an offset; raises OSError, as where the disk is full."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view[:MOST_BYTES_OF_CALL], offset)
            offset += written
            view = view[written:]

    def read(self, count: int, offset: int) -> bytes:
        """Return so many bytes from an offset on; fewer where the file ends."""
        parts: list[bytes] = []
        while count and (part := os.pread(self._descriptor, min(count, MOST_BYTES_OF_CALL), offset)):
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class FileArray(Array):
    """An array, described as its sender does, whose bytes lie in a file; `data` and `numpy()` read all of them."""

    def __init__(
        self, dtype: str, shape: tuple[int, ...], stype: str, file: ScratchFile, offset: int, size: int
    ) -> None:
        """Keep where it is; the initialiser above would keep the bytes themselves."""
        self.dtype, self.shape, self.stype = dtype, shape, stype
        self.file, self.offset, self.size = file, offset, size

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """All bytes."""
        return self.file.read(self.size, self.offset)


class _Stream(Protocol):
    def read(self, count: int, /) -> bytes: ...


class _Section:
    """The bytes of a file array, read from the first to the last."""

    def __init__(self, array: FileArray) -> None:
        self._array = array
        self._done = 0

    def read(self, count: int, /) -> bytes:
        array = self._array
        data = array.file.read(min(count, array.size - self._done), array.offset + self._done)
        self._done += len(data)
        return data


def record_bytes(record: Mapping[str, Array]) -> int:
    """Return how many bytes the arrays of a record take on the wire."""
    return sum(array.size if isinstance(array, FileArray) else len(array.data) for array in record.values())


def blocks_of(array: Array) -> Iterator[NDArray[np.float32]]:
    """Yield the numbers of an array that numpy's `save` made as float32, row by row, in blocks of `BLOCK`.

    Raises:
        MisdescribedArrayError: The bytes say another shape or number format than the description.
        ValueError: They cannot be read, or are too few or too many.
    """
    if array.stype != NUMPY:
        raise ValueError("It is serialised in another way.")
    stream = _Section(array) if isinstance(array, FileArray) else io.BytesIO(array.data)
    shape, dtype = _header(stream)
    if shape != tuple(array.shape) or dtype != np.dtype(array.dtype):
        raise MisdescribedArrayError(f"It holds {printable(dtype)} of the shape {shape_text(shape)}.")
    left = math.prod(shape)
    while left:
        count = min(BLOCK, left)
        values = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
        if len(values) != count:
            raise ValueError("It ends too early.")
        yield values.astype(np.float32, copy=False)
        left -= count
    if stream.read(1):
        raise ValueError("It goes on after its end.")


def joined(blocks: Iterable[NDArray[np.float32]], shape: Sequence[int]) -> NDArray[np.float32]:
    """Return blocks, row by row, as one array of a shape."""
    values = np.empty(math.prod(shape), np.float32)
    done = 0
    for block in blocks:
        values[done : done + len(block)] = block
        done += len(block)
    return values.reshape(tuple(shape))


def _header(stream: _Stream) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)  # type: ignore[arg-type]
    if version != (1, 0):
        raise ValueError("Its header is of another version.")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(stream)  # type: ignore[arg-type]
    if in_columns:
        raise ValueError("It is stored by columns.")
    return shape, dtype


def to_wire(weights: Weights, dtype: TransportDtype = "float32", *, release: bool = False) -> ArrayRecord:
    """Return tensors as arrays of one number format in the order of their names.

    As float32, bfloat16 (which Flower's arrays cannot hold) and float16 lose nothing.

    Args:
        weights: Tensors by name.
        dtype: The number format in which they travel.
        release: Whether to empty the dict meanwhile, so that the weights are in memory once.

    Raises:
        FederationError: A value is too large for float16.
    """
    take, record = weights.pop if release else weights.__getitem__, ArrayRecord()
    for name in sorted(weights):
        record[name] = Array(_encoded(name, _float32(take(name)), dtype))
    return record


def from_wire(record: ArrayRecord, *, release: bool = False) -> Weights:
    """Return a record's arrays as float32 tensors that own their memory; `release` empties it as `to_wire` does."""
    take = record.pop if release else record.__getitem__
    return {name: torch.from_numpy(joined(blocks_of(array := take(name)), array.shape)) for name in list(record)}


def update_to_wire(trained: Weights, received: Mapping[str, Tensor], dtype: TransportDtype) -> ArrayRecord:
    """Return what a client sends: its weights as float32, or what training has changed of them as float16.

    A step is often smaller than the precision of a float16 weight; as a difference it keeps 11 bits of its own.

    Raises:
        FederationError: A difference is too large for float16.
    """
    if dtype == "float32":
        return to_wire(trained)
    return to_wire({name: trained[name].cpu().float() - received[name].cpu().float() for name in trained}, dtype)


def to_ndarrays(weights: Mapping[str, Tensor]) -> list[NDArray[np.float32]]:
    """Return tensors as float32 arrays in the order of their names, as Flower's classic API carries them."""
    return [_float32(weights[name]) for name in sorted(weights)]


def manifest_of(weights: Mapping[str, Tensor]) -> Manifest:
    """Return names and shapes of tensors, in the order of their names."""
    return {name: list(weights[name].shape) for name in sorted(weights)}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of names and values, of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(Array(_float32(weights[name])).data)
    return digest.hexdigest()


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, with its parent folders; the caller sees to atomicity."""
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


def load_weights(path: Path) -> Weights:
    """Read tensors from a safetensors file into memory of their own; raises ModelError where that cannot be."""
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
