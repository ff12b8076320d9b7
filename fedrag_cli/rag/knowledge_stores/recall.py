"""How much of the exact result another search finds."""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_AT, RECALL_SAMPLE = 10, 200


def sampled_positions(passages: int, seed: int = 0) -> Tensor:
    """Return the positions of the passages that stand for queries, at most 200."""
    return torch.randperm(passages, generator=torch.Generator().manual_seed(seed))[:RECALL_SAMPLE]


def found_at_once(passages: int) -> int:
    """Return how many passages are searched for, the one that stands for the query included."""
    return min(RECALL_AT + 1, passages)


def recall(sample: Tensor, exact: Tensor, found: Tensor) -> float:
    """Return recall@10: which part of the 10 passages that are closest to a passage a search finds, from 0 to 1.

    Args:
        sample: Positions of the passages that stand for queries, of shape (queries,); each is searched for among the
            others.
        exact: Positions that the exact search gives for each, of shape (queries, found_at_once(passages)).
        found: Positions that the other search gives, of the same shape.
    """
    shares = []
    for passage, right, got in zip(sample.tolist(), exact.tolist(), found.tolist(), strict=True):
        others = {position for position in right if position != passage}
        shares.append(len(others & set(got)) / max(len(others), 1))
    return sum(shares) / len(shares)
