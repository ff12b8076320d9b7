"""Fusion of dense and lexical scores into one ranking; pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def candidates_of(dense: Tensor, lexical: Tensor) -> tuple[Tensor, Tensor]:
    """Return the passages that either side found, each one once.

    Args:
        dense: Positions that the dense side found, of shape (queries, n).
        lexical: Those of the lexical side, of shape (queries, m).

    Returns:
        Positions of shape (queries, n + m) in ascending order, and a mask of that shape that is False where a position
        stands a second time.
    """
    positions = torch.cat([dense, lexical], dim=1).sort(dim=1).values
    is_new = torch.ones_like(positions, dtype=torch.bool)
    is_new[:, 1:] = positions[:, 1:] != positions[:, :-1]
    return positions, is_new


def standardized(scores: Tensor, mask: Tensor) -> Tensor:
    """Return z-scores a query: mean 0 and standard deviation 1 over its candidates; 0 where all scores are equal.

    Args:
        scores: Of shape (queries, candidates).
        mask: Which candidates count, of the same shape; at least one a query. The others get 0.
    """
    count = mask.sum(dim=1, keepdim=True)
    mean = (scores * mask).sum(dim=1, keepdim=True) / count
    centred = (scores - mean) * mask
    variance = centred.square().sum(dim=1, keepdim=True) / count
    # Scores that differ by rounding alone are equal; and the root of 0 has no gradient.
    is_flat = variance <= (1e-6 * (scores.abs() * mask).amax(dim=1, keepdim=True)).square()
    return torch.where(is_flat, 0.0, centred / variance.masked_fill(is_flat, 1.0).sqrt())


def weighted_sum(dense: Tensor, lexical: Tensor, mask: Tensor, weight: float | Tensor) -> Tensor:
    """Return weight * z(dense) + (1 - weight) * z(lexical), with gradient into `dense` and `weight`.

    Args:
        dense: Similarities, of shape (queries, candidates).
        lexical: BM25 scores, of the same shape.
        mask: Which candidates count, of the same shape; the others get minus infinity.
        weight: Share of the dense side, from 0 to 1.
    """
    fused = weight * standardized(dense, mask) + (1 - weight) * standardized(lexical, mask)
    return fused.masked_fill(~mask, -torch.inf)


def reciprocal_rank_fusion(dense: Tensor, lexical: Tensor, mask: Tensor, constant: float = 60.0) -> Tensor:
    """Return 1 / (constant + rank) summed over both sides.

    A passage without any word of the query has no lexical rank. Source: Cormack, Clarke and Büttcher, "Reciprocal Rank
    Fusion outperforms Condorcet and individual Rank Learning Methods" (SIGIR 2009).

    Args:
        dense: Similarities, of shape (queries, candidates).
        lexical: BM25 scores, of the same shape; 0 where a passage has no word of the query.
        mask: Which candidates count, of the same shape; the others get minus infinity.
        constant: Damps the weight of the first ranks; 60 in the paper.
    """
    fused = 1 / (constant + _ranks(dense, mask)) + (1 / (constant + _ranks(lexical, mask))) * (lexical > 0)
    return fused.masked_fill(~mask, -torch.inf)


def best(scores: Tensor, positions: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the best scores and their positions, of shape (queries, top_k); equal scores by position.

    Args:
        scores: Of shape (queries, candidates); minus infinity where a candidate does not count.
        positions: Of the same shape, in ascending order.
        top_k: At most the number of candidates that count.
    """
    found = scores.sort(dim=1, descending=True, stable=True)
    return found.values[:, :top_k], positions.gather(1, found.indices[:, :top_k])


def _ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Return ranks from 1; equal scores share the best rank, so that their order does not matter."""
    counted = scores.masked_fill(~mask, -torch.inf)
    ascending = counted.sort(dim=1).values
    above = counted.shape[1] - torch.searchsorted(ascending, counted, right=True)
    return above + 1
