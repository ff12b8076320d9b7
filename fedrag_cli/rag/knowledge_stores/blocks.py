"""Exact search that never holds the scores of all passages at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fedrag_cli.rag.knowledge_stores.ties import top_in_order

SCORES_AT_ONCE = 2**22
# Fewer passages at once would spend more time on choosing than on comparing.
LEAST_ROWS = 4096


class Vectors(Protocol):
    """Embeddings that can be gone through part by part."""

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all embeddings in their order, at most `rows` at once; each is valid until the next is asked for."""


def search_blocks(vectors: Vectors, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the best passages of each query by comparing it with all of them, block after block.

    Args:
        vectors: The embeddings, in any number format.
        queries: float32 tensor of shape (queries, dimension), on the device where scores are computed.
        top_k: How many passages, from 1 to their number.

    Returns:
        Scores and positions, both of shape (queries, top_k), best first; equal scores by position.
    """
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
