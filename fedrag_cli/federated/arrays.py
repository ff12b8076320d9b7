"""Reading arrays that came over the wire a block at a time, wherever their bytes lie."""

from __future__ import annotations

import io
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.app import Array
from flwr.common.constant import SType
from numpy.typing import NDArray

from fedrag_cli.text import printable, shape_text

BLOCK = 2**18
"""Numbers that are in memory at once."""
AT_ONCE = 2**20


class MisdescribedArrayError(ValueError):
    """The bytes of an array are not what its description says."""


class ScratchFile:
    """A file without a name, for this process alone, that is gone with the object or with the process.

    Args:
        directory: Where it takes its room.
    """

    def __init__(self, directory: Path) -> None:
        """Make it, readable by the owner only; raises OSError."""
        self._descriptor, path = tempfile.mkstemp(dir=directory)
        Path(path).unlink()
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, data: bytes, offset: int) -> None:
        """Put bytes at an offset; raises OSError, as where the disk is full."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view[:AT_ONCE], offset)
            offset += written
            view = view[written:]

    def read(self, count: int, offset: int) -> bytes:
        """Return so many bytes from an offset on; fewer where the file ends."""
        parts: list[bytes] = []
        while count and (part := os.pread(self._descriptor, min(count, AT_ONCE), offset)):
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class FileArray(Array):
    """An array whose bytes lie in a file; `data` and `numpy()` read all of it into memory.

    Args:
        dtype: Number format, as the sender names it.
        shape: Shape, as the sender names it.
        stype: How it is serialised.
        file: Where the bytes lie.
        offset: Where in the file they begin.
        size: Number of bytes.
    """

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


def array_bytes(array: Array) -> int:
    """Return how many bytes an array takes on the wire."""
    return array.size if isinstance(array, FileArray) else len(array.data)


def record_bytes(record: Mapping[str, Array]) -> int:
    """Return how many bytes the arrays of a record take on the wire."""
    return sum(array_bytes(array) for array in record.values())


def blocks_of(array: Array) -> Iterator[NDArray[np.float32]]:
    """Yield the numbers of an array as float32, row by row, in blocks of `BLOCK`.

    Args:
        array: Made by numpy's `save`, which other programs may only claim.

    Raises:
        MisdescribedArrayError: The bytes say another shape or number format than the description.
        ValueError: They cannot be read, or are too few or too many.
    """
    if array.stype != SType.NUMPY:
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


def whole(array: Array) -> NDArray[np.float32]:
    """Return an array as float32, in memory of its own; see `blocks_of`."""
    return joined(blocks_of(array), array.shape)


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
