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


def top_in_order(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the best scores of each row and their columns, best first, equal ones by column.

    Args:
        scores: Tensor of shape (rows, columns), without NaN.
        top_k: How many, from 1 up; a row with fewer columns gives all of them.

    Returns:
        Scores and columns, both of shape (rows, min(top_k, columns)).
    """
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
