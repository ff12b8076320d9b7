"""A saved store that stays on disk: embeddings and passages are read where a search needs them."""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.knowledge_stores.embeddings_file import EmbeddingsFile
from fedrag_cli.rag.knowledge_stores.faults import damaged_store
from fedrag_cli.rag.knowledge_stores.passages import NODES_FILE
from fedrag_cli.rag.knowledge_stores.vectors import rows_at_once

_BYTES_AT_ONCE = 2**22


class MappedVectors:
    """Embeddings in a file, of which only what is being looked at takes memory.

    Args:
        file: The file, with at least one embedding.
    """

    def __init__(self, file: EmbeddingsFile) -> None:
        """Map the file."""
        self._mapping = _map(file.path)
        self.dimension = file.dimension
        with warnings.catch_warnings():
            # Nothing writes into the tensor, and a mapping that could be written to would count as used memory.
            warnings.filterwarnings("ignore", message=".*not writable")
            numbers = torch.frombuffer(
                self._mapping, dtype=file.dtype, count=file.rows * file.dimension, offset=file.offset
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
    """Passages in a file of JSON lines, of which only the places of the lines take memory.

    Args:
        path: The file, with at least one passage.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and find its lines; raises ValueError where the last one is cut off."""
        self._path, self._mapping = path, _map(path)
        ends = []
        for start, part in self._parts():
            ends.append(np.flatnonzero(np.frombuffer(part, dtype=np.uint8) == ord("\n")) + start + 1)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
        if self._starts[-1] != len(self._mapping):
            raise ValueError(f"'{path.name}' ends early")

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._starts) - 1

    def at(self, positions: Sequence[int]) -> list[KnowledgeNode]:
        """Read the passages at some positions.

        Raises:
            KnowledgeStoreError: One is damaged.
        """
        try:
            rows: list[Any] = [
                json.loads(self._mapping[self._starts[position] : self._starts[position + 1]]) for position in positions
            ]
            found = [KnowledgeNode(**row) for row in rows]
        except (ValueError, TypeError) as error:
            raise damaged_store(self._path.parent, error) from error
        _drop(self._mapping)
        return found

    def write(self, path: Path) -> None:
        """Copy the passages into another file."""
        with path.open("wb") as file:
            for _, part in self._parts():
                file.write(part)

    def _parts(self) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(self._mapping), _BYTES_AT_ONCE):
            yield start, self._mapping[start : start + _BYTES_AT_ONCE]
            _drop(self._mapping)


@dataclass(frozen=True)
class MappedStore:
    """What a folder holds, left there.

    Args:
        vectors: The embeddings.
        passages: The passages, in the same order.
    """

    vectors: MappedVectors
    passages: MappedPassages

    @classmethod
    def open(cls, directory: Path, file: EmbeddingsFile) -> MappedStore:
        """Map a folder's files, which hold at least one passage; raises ValueError or OSError where that fails."""
        return cls(MappedVectors(file), MappedPassages(directory / NODES_FILE))


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _drop(mapping: mmap.mmap) -> None:
    """Give back the memory of what was read; the file still has it."""
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)
