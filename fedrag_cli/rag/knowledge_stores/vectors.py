"""Embeddings held in memory, in one tensor that grows little by little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LEAST_ROOM = 1024
# What is converted or copied goes in blocks of so many numbers, small enough for a processor's cache.
NUMBERS_AT_ONCE = 2**20


class HeldVectors:
    """Embeddings in one tensor with room for an eighth more; the room takes no memory before it is written to.

    Args:
        device: Where they are kept.
        dtype: Their number format.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Start without any."""
        self._buffer = torch.empty((0, 0), dtype=dtype, device=device)
        self._count = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    @property
    def dimension(self) -> int:
        """How many numbers each has; 0 where there is none."""
        return self._buffer.shape[1] if self._count else 0

    @property
    def rows(self) -> Tensor:
        """All of them, of shape (count, dimension); a view that later changes write into."""
        return self._buffer[: self._count]

    @classmethod
    def around(cls, values: Tensor) -> HeldVectors:
        """Wrap a tensor of shape (count, dimension) without copying it; it is only to be read."""
        held = cls(values.device, values.dtype)
        held._buffer, held._count = values, len(values)
        return held

    def at(self, positions: Tensor) -> Tensor:
        """Return copies of those at a tensor of positions of any shape."""
        return self.rows[positions.to(self._buffer.device)]

    def extend(self, values: Tensor, expected: int = 0) -> None:
        """Append a tensor of shape (new, dimension), in any number format.

        Args:
            values: The new ones.
            expected: How many there will be in the end, where more are known to follow.
        """
        count = self._count + len(values)
        self._reserve(max(count, expected), values.shape[1])
        self._buffer[self._count : count] = values
        self._count = count

    def put(self, positions: Sequence[int], values: Tensor) -> None:
        """Put other values in the place of those at some positions."""
        self._buffer[list(positions)] = values.to(self._buffer.device, self._buffer.dtype)

    def replace(self, values: Tensor) -> None:
        """Put other values in the place of all, in a new tensor."""
        self._buffer, self._count = self._buffer.new_empty((0, 0)), 0
        self.extend(values)

    def keep(self, positions: Sequence[int]) -> None:
        """Keep those at some positions, which ascend, and drop the rest."""
        first = next((row for row, position in enumerate(positions) if row != position), len(positions))
        # Each block moves to where only rows were that have moved already, or that go.
        step = rows_at_once(self._buffer.shape[1])
        for start in range(first, len(positions), step):
            moved = self._buffer[torch.tensor(positions[start : start + step], device=self._buffer.device)]
            self._buffer[start : start + len(moved)] = moved
        self._count = len(positions)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all of them in their order as views, at most `rows` at once."""
        if self._buffer.dtype != torch.float32:
            rows = min(rows, rows_at_once(self._buffer.shape[1]))
        for start in range(0, self._count, rows):
            yield self._buffer[start : min(start + rows, self._count)]

    def _reserve(self, count: int, dimension: int) -> None:
        if not self._count and dimension != self._buffer.shape[1]:
            self._buffer = self._buffer.new_empty((0, dimension))
        if count > len(self._buffer):
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(mode=False):
                grown = self._buffer.new_empty((count + max(LEAST_ROOM, count // 8), dimension))
            grown[: self._count] = self.rows
            self._buffer = grown


def rows_at_once(dimension: int) -> int:
    """Return how many embeddings of a dimension are converted or copied at once."""
    return max(1, NUMBERS_AT_ONCE // max(1, dimension))


def format_name(dtype: torch.dtype) -> str:
    """Return a number format's name as configs write it."""
    return str(dtype).removeprefix("torch.")
