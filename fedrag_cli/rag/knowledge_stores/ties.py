"""The order of passages with equal scores, which torch and other libraries leave open."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def search_in_order(search: Search, queries: Tensor, top_k: int, passages: int) -> tuple[Tensor, Tensor]:
    """Search so that equal scores come by position, and the first of those that tie for the last places are taken.

    Args:
        search: Takes queries and how many passages are wanted of each (up to `passages`), and returns scores and
            positions of shape (queries, wanted) in any order.
        queries: Tensor of shape (queries, dimension).
        top_k: How many passages, from 1 to `passages`.
        passages: How many there are.

    Returns:
        Scores and positions, both of shape (queries, top_k).
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


def _in_order(scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    by_position = positions.argsort(dim=1)
    scores, positions = scores.gather(1, by_position), positions.gather(1, by_position)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), positions.gather(1, order)
