"""Exact search on torch that never holds the scores of all passages at once, in an order that is always the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

LEAST_ROOM = 1024
# What is converted or copied goes in blocks of so many numbers, small enough for a processor's cache.
NUMBERS_AT_ONCE = 2**20


class HeldVectors:
    """Embeddings in one tensor with room for an eighth more; the room takes no memory before it is written to."""

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
        """Append a tensor of shape (new, dimension), in any format; `expected` is how many there will be at last."""
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


Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def search_in_order(search: Search, queries: Tensor, top_k: int, passages: int) -> tuple[Tensor, Tensor]:
    """Search so that equal scores come by position, and the first of those that tie for the last places are taken.

    The search takes queries and how many passages are wanted of each, and returns them in any order.
    """
    scores = queries.new_zeros(len(queries), top_k)
    positions = torch.zeros_like(scores, dtype=torch.long)
    rows, wanted = torch.arange(len(queries), device=queries.device), min(top_k + 1, passages)
    while len(rows):
        found, places = _in_order(*search(queries[rows], wanted))
        # As long as the last one found ties with the last one wanted, there may be more of them.
        settled = found[:, top_k - 1] > found[:, -1] if wanted < passages else torch.ones_like(rows, dtype=torch.bool)
        scores[rows[settled]] = found[settled, :top_k]
        positions[rows[settled]] = places[settled, :top_k]
        rows, wanted = rows[~settled], min(4 * wanted, passages)
    return scores, positions


def top_in_order(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the best scores of each row, which have no NaN, and their columns, best first, equal ones by column."""
    # One more than wanted shows whether the last place is contested.
    best, columns = scores.topk(min(top_k + 1, scores.shape[1]), dim=1)
    kept, places = best[:, :top_k], columns[:, :top_k]
    if bool((best[:, 1:] < best[:, :-1]).all()):
        return kept, places
    if best.shape[1] > top_k:
        contested = best[:, top_k] == best[:, top_k - 1]
        places[contested] = _first_columns(scores[contested], kept[contested, -1:], top_k)
        kept = scores.gather(1, places)
    return _in_order(kept, places)


def _first_columns(scores: Tensor, least: Tensor, top_k: int) -> Tensor:
    """Return the columns above a row's least score, and the first of those that equal it, `top_k` in all."""
    above, equal = scores > least, scores == least
    missing = top_k - above.sum(dim=1, keepdim=True)
    taken = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(scores), top_k)


def _in_order(scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if bool((scores[:, 1:] < scores[:, :-1]).all()):
        return scores, positions
    by_position = positions.argsort(dim=1)
    scores, positions = scores.gather(1, by_position), positions.gather(1, by_position)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), positions.gather(1, order)


SCORES_AT_ONCE = 2**22
# Fewer passages at once would spend more time on choosing than on comparing.
LEAST_ROWS = 4096


class Vectors(Protocol):
    """Embeddings that can be gone through part by part."""

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all embeddings in their order, at most `rows` at once; each is valid until the next is asked for."""


def search_blocks(vectors: Vectors, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the best passages of each query by comparing it with all of them, block after block, on its device."""
    # Entering autocast costs as much as choosing among thousands of scores.
    if torch.is_autocast_enabled(queries.device.type):
        with torch.autocast(queries.device.type, enabled=False):
            return search_blocks(vectors, queries, top_k)
    at_once = max(1, SCORES_AT_ONCE // max(LEAST_ROWS, 2 * top_k))
    if len(queries) <= at_once:
        return _search(vectors, queries, top_k)
    parts = [_search(vectors, part, top_k) for part in queries.split(at_once)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([positions for _, positions in parts])


def _search(vectors: Vectors, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] | None = None
    start = 0
    for block in vectors.blocks(max(1, SCORES_AT_ONCE // max(1, len(queries)))):
        here = top_in_order(queries @ block.to(queries.device, torch.float32).T, top_k)
        found = here if found is None else _merged(found, here, start, top_k)
        start += len(block)
    assert found is not None
    return found


def _merged(
    before: tuple[Tensor, Tensor], here: tuple[Tensor, Tensor], start: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Choose among what earlier blocks gave and what the one that begins at a position gave."""
    # What was found before has lower positions and stands first, so a stable order keeps ties right.
    scores = torch.cat([before[0], here[0]], dim=1)
    positions = torch.cat([before[1], here[1] + start], dim=1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return scores.gather(1, order), positions.gather(1, order)


RECALL_AT, RECALL_SAMPLE = 10, 200


def measured_recall(
    embeddings_at: Callable[[Tensor], Tensor], exact: Vectors, search: Search, passages: int, seed: int = 0
) -> float:
    """Return recall@10: which part of the 10 passages that are closest to a passage a search finds, from 0 to 1.

    It is a mean over at most 200 passages, chosen by the seed, each searched for among the others.
    """
    sample = torch.randperm(passages, generator=torch.Generator().manual_seed(seed))[:RECALL_SAMPLE]
    queries, wanted = embeddings_at(sample), min(RECALL_AT + 1, passages)
    closest, found = (
        positions.tolist() for _, positions in (search_blocks(exact, queries, wanted), search(queries, wanted))
    )
    shares = []
    for passage, right, got in zip(sample.tolist(), closest, found, strict=True):
        others = {position for position in right if position != passage}
        shares.append(len(others & set(got)) / max(len(others), 1))
    return sum(shares) / len(shares)
