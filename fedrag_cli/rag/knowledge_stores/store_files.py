"""The files of a saved store: passages, embeddings, what is wrong with them, and reading them where they lie."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import NODES_FILE
from fedrag_cli.rag.knowledge_stores.exact_search import rows_at_once
from fedrag_cli.runs.files import restore_interrupted

REBUILD = "Build it anew with 'fedrag index CONFIG --rebuild'."


@contextmanager
def store_errors(directory: Path, kind: str = "", *more: type[Exception]) -> Iterator[None]:
    """Turn errors of reading a folder's files, and more that a library raises, into KnowledgeStoreError.

    It says what is missing or damaged, and whose store it is: `kind` begins with a space.
    """
    damaged: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, LookupError, SafetensorError, *more)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KnowledgeStoreError(
            f"'{directory}' holds no knowledge store{kind}: {reason_of(error)}", REBUILD
        ) from error
    except damaged as error:
        raise KnowledgeStoreError(
            f"The knowledge store in '{directory}' is damaged: {reason_of(error)}", REBUILD
        ) from error


def reason_of(error: Exception) -> str:
    """Return what an error of reading a store's files says, with a full stop."""
    if isinstance(error, OSError):
        # safetensors names the file in its text alone.
        name = Path(str(error.filename or str(error).rpartition(": ")[2])).name
        if isinstance(error, FileNotFoundError):
            return f"'{name}' is missing."
        return f"'{name}' cannot be read ({error.strerror or error})."
    if isinstance(error, KeyError):
        return f"it has no {error}."
    if type(error) is ValueError:
        return sentence(str(error))
    return f"it is not as it was written ({error})."


def sentence(text: str) -> str:
    """Return what a library says with a full stop at its end, and without the system's number in front."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", text)
    return text if text.endswith((".", "!", "?")) else f"{text}."


_ATTEMPTS = 5

T = TypeVar("T")


def read_one_state(directory: Path, read: Callable[[], T]) -> T:
    """Read a folder so that all its files are of the same writing.

    Each file is opened by its path, so that one of the old folder could meet one of the new, which would pair passages
    with the embeddings of others. Where `read` raises KnowledgeStoreError, a folder that was replaced is read again.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(directory)
        try:
            result = read()
        except KnowledgeStoreError:
            if _identity(directory) == before and not restore_interrupted(directory):
                raise
            continue
        if _identity(directory) == before:
            return result
    raise KnowledgeStoreError(
        f"The knowledge store in '{directory}' was replaced again and again while it was being read.",
        "Wait for the process that writes it, and run the command again.",
    )


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """Return what tells one writing of a folder from all others; None where it is gone."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


_ENDS = 65536


class Passages:
    """Passages in the order of their positions, each id once."""

    def __init__(self, nodes: Sequence[KnowledgeNode] = ()) -> None:
        """Number the passages."""
        self._number(list(nodes))

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self.nodes)

    def put(self, nodes: Sequence[KnowledgeNode]) -> tuple[dict[int, int], list[int]]:
        """Add passages, each id once, or replace those whose id is there already.

        Returns:
            The positions of replaced passages by their rows in `nodes`, and the rows of the new ones in their order.
        """
        replaced, fresh = {}, []
        for row, node in enumerate(nodes):
            position = self.positions.get(node.id)
            if position is None:
                fresh.append(row)
                self.positions[node.id] = len(self.nodes)
                self.nodes.append(node)
            else:
                replaced[row] = position
                self.nodes[position] = node
        return replaced, fresh

    def remove(self, ids: Collection[str]) -> list[int]:
        """Remove passages and return the old positions of those that stay."""
        gone = {self.positions[id] for id in ids if id in self.positions}
        kept = [position for position in range(len(self.nodes)) if position not in gone]
        if gone:
            self._number([self.nodes[position] for position in kept])
        return kept

    def _number(self, nodes: list[KnowledgeNode]) -> None:
        self.nodes = nodes
        self.positions = {node.id: position for position, node in enumerate(nodes)}


def write_nodes(nodes: Iterable[KnowledgeNode], directory: Path) -> list[int]:
    """Write passages as JSON lines; return where each begins, in bytes, and at last where the file ends."""
    offsets = [0]
    with (directory / NODES_FILE).open("wb") as file:
        for node in nodes:
            row = {"id": node.id, "text": node.text, "metadata": node.metadata}
            # Lone surrogates, which UTF-8 cannot hold, become escapes that JSON knows.
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    return offsets


def read_nodes(directory: Path) -> list[KnowledgeNode]:
    """Read passages that `write_nodes` wrote; raises OSError, ValueError or TypeError where they are damaged."""
    with (directory / NODES_FILE).open(encoding="utf-8") as lines:
        return [KnowledgeNode(**json.loads(line)) for line in lines]


def file_fingerprint(path: Path) -> str:
    """Return a hash over a file's size, its beginning and its end, of 16 hexadecimal digits.

    It finds what a full disk or a broken copy leaves, before a library reads the file that would crash on it, and
    takes no longer for a large file.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(-min(size, _ENDS), os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


_EMBEDDINGS, _OFFSETS = "embeddings", "offsets"
_FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _FORMATS.items()}
_LENGTH = 8


@dataclass(frozen=True)
class EmbeddingsFile:
    """What a file of embeddings says of itself."""

    path: Path
    metadata: dict[str, str]
    rows: int
    dimension: int
    dtype: torch.dtype
    start: int
    """Where the embeddings begin, in bytes."""
    offsets_start: int | None
    """Where the offsets of the passages begin; None where an earlier version wrote the file."""

    @classmethod
    def open(cls, path: Path) -> EmbeddingsFile:
        """Look at a file without reading its embeddings.

        Raises:
            SafetensorError: It is damaged.
            ValueError: It holds something other than embeddings.
            OSError: It cannot be read.
        """
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
        if names not in ({_EMBEDDINGS}, {_EMBEDDINGS, _OFFSETS}):
            raise ValueError(f"it holds {sorted(names)} in the place of {_EMBEDDINGS}")
        with path.open("rb") as raw:
            data_start = _LENGTH + (length := int.from_bytes(raw.read(_LENGTH), "little"))
            header = json.loads(raw.read(length))
        about, offsets = header[_EMBEDDINGS], header.get(_OFFSETS)
        shape, format = about["shape"], about["dtype"]
        if len(shape) != 2 or format not in _FORMATS:
            raise ValueError(f"it holds {format} of the shape {shape}")
        if offsets is not None and (offsets["dtype"], offsets["shape"]) != ("I64", [shape[0] + 1]):
            raise ValueError(f"it holds offsets {offsets['dtype']} of the shape {offsets['shape']}")
        return cls(
            path,
            metadata,
            shape[0],
            shape[1],
            _FORMATS[format],
            data_start + about["data_offsets"][0],
            None if offsets is None else data_start + offsets["data_offsets"][0],
        )

    def blocks(self) -> Iterator[Tensor]:
        """Read all embeddings in their order, a block at a time, each valid until the next is asked for."""
        step = min(rows_at_once(self.dimension), max(self.rows, 1))
        block = torch.empty((step, self.dimension), dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(self.start)
            for start in range(0, self.rows, step):
                part = block[: min(step, self.rows - start)]
                raw = raw_bytes(part)
                if file.readinto(raw) != len(raw):
                    raise ValueError("it ends early")
                yield part


def write_embeddings(
    path: Path,
    blocks: Iterable[Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    metadata: dict[str, str],
    offsets: Sequence[int],
) -> None:
    """Write embeddings in a number format as safetensors, block by block, with the offsets of `write_nodes`."""
    places = np.asarray(offsets, dtype="<i8")
    end = places.nbytes + shape[0] * shape[1] * dtype.itemsize
    header = {
        "__metadata__": metadata,
        _OFFSETS: {"dtype": "I64", "shape": places.shape, "data_offsets": (0, places.nbytes)},
        _EMBEDDINGS: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (places.nbytes, end)},
    }
    text = json.dumps(header).encode()
    # The format wants the numbers to begin at a multiple of eight.
    text += b" " * (-len(text) % _LENGTH)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text + places.tobytes())
        for block in blocks:
            file.write(raw_bytes(block))


def raw_bytes(embeddings: Tensor) -> memoryview:
    """Return the bytes of embeddings as they lie in memory and in files."""
    array: Any = embeddings.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


_BYTES_AT_ONCE = 2**22


class MappedVectors:
    """Embeddings in a file, at least one, of which only what is being looked at takes memory."""

    def __init__(self, file: EmbeddingsFile) -> None:
        """Map the file."""
        self._mapping = _map(file.path)
        self.dimension = file.dimension
        with warnings.catch_warnings():
            # Nothing writes into the tensor, and a mapping that could be written to would count as used memory.
            warnings.filterwarnings("ignore", message=".*not writable")
            numbers = torch.frombuffer(
                self._mapping, dtype=file.dtype, count=file.rows * file.dimension, offset=file.start
            )
        self.rows = numbers.view(file.rows, file.dimension)

    def at(self, positions: Tensor) -> Tensor:
        """Return those at a tensor of positions, in memory."""
        found = self.rows[positions.cpu()]
        _drop(self._mapping)
        return found

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all of them in their order, at most `rows` at once; each is valid until the next is asked for."""
        for block in self.rows.split(min(rows, rows_at_once(self.dimension))):
            yield block
            _drop(self._mapping)


class MappedPassages:
    """Passages in a file of JSON lines, at least one, of which only what is being read takes memory."""

    def __init__(self, path: Path, embeddings: EmbeddingsFile) -> None:
        """Map the file; raises ValueError where its last line does not end where it should."""
        self._path, self._mapping = path, _map(path)
        if embeddings.offsets_start is None:
            ends = [
                np.flatnonzero(np.frombuffer(part, dtype=np.uint8) == ord("\n")) + start + 1
                for start, part in self._parts()
            ]
            self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
        else:
            mapped = _map(embeddings.path)
            self._offsets = np.frombuffer(mapped, "<i8", embeddings.rows + 1, embeddings.offsets_start)
        if self._offsets[-1] != len(self._mapping) or self._mapping[-1:] != b"\n":
            raise ValueError(f"'{path.name}' is not as long as it was written")

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._offsets) - 1

    def at(self, positions: Sequence[int]) -> list[KnowledgeNode]:
        """Read the passages at some positions.

        Raises:
            KnowledgeStoreError: One is damaged.
        """
        with store_errors(self._path.parent):
            rows: list[Any] = [
                json.loads(self._mapping[self._offsets[position] : self._offsets[position + 1]])
                for position in positions
            ]
            found = [KnowledgeNode(**row) for row in rows]
        _drop(self._mapping)
        return found

    def write(self, directory: Path) -> list[int]:
        """Copy the passages into a directory; return their offsets."""
        with (directory / NODES_FILE).open("wb") as file:
            for _, part in self._parts():
                file.write(part)
        return self._offsets.tolist()

    def _parts(self) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(self._mapping), _BYTES_AT_ONCE):
            yield start, self._mapping[start : start + _BYTES_AT_ONCE]
            _drop(self._mapping)


@dataclass(frozen=True)
class MappedStore:
    """What a folder holds, left there, in the same order."""

    vectors: MappedVectors
    passages: MappedPassages

    @classmethod
    def open(cls, directory: Path, file: EmbeddingsFile) -> MappedStore:
        """Map a folder's files, which hold at least one passage; raises ValueError or OSError where that fails."""
        return cls(MappedVectors(file), MappedPassages(directory / NODES_FILE, file))


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _drop(mapping: mmap.mmap) -> None:
    """Give back the memory of what was read; the file still has it."""
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)
