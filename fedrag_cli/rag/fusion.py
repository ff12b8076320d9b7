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


def lexical_bonus(dense: Tensor, lexical: Tensor, mask: Tensor, weight: float | Tensor) -> Tensor:
    """Return what the words of a query add to the similarity of each candidate.

    Ranking by similarity + bonus is ranking by weight * z(dense) + (1 - weight) * z(lexical), with z-scores over the
    candidates of a query. In units of the similarity, fused scores go with the temperatures that similarities have, and
    a loss of them has the same gradient into the encoder.

    Args:
        dense: Similarities, of shape (queries, candidates).
        lexical: BM25 scores, of the same shape.
        mask: Which candidates count, of the same shape; at least one a query. The others get 0.
        weight: Share of the dense side, above 0, up to 1.
    """
    deviation = _deviation(dense, mask)
    # Where similarities tell nothing apart, the words do.
    scale = torch.where(deviation > 0, deviation, 1.0)
    spread = _deviation(lexical, mask)
    centred = (lexical - _mean(lexical, mask)) * mask
    return (1 - weight) / weight * scale * torch.where(spread > 0, centred / spread.clamp(min=1e-30), 0.0)


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


def _mean(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)


def _deviation(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation of each query's candidates, (queries, 1); 0 where they differ by rounding alone."""
    centred = (scores - _mean(scores, mask)) * mask
    variance = centred.square().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    least = (1e-6 * (scores.abs() * mask).amax(dim=1, keepdim=True)).square()
    # The root of 0 has no gradient.
    return torch.where(variance > least, variance.clamp(min=1e-30).sqrt(), 0.0)


def _ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Return ranks from 1; equal scores share the best rank, so that their order does not matter."""
    counted = scores.masked_fill(~mask, -torch.inf)
    ascending = counted.sort(dim=1).values
    above = counted.shape[1] - torch.searchsorted(ascending, counted, right=True)
    return above + 1
