"""Fusion of dense and lexical scores: the formulas, masks, equal scores and gradients."""

from __future__ import annotations

import pytest
import torch

from fedrag_cli.rag.fusion import best, candidates_of, reciprocal_rank_fusion, standardized, weighted_sum

DENSE = torch.tensor([[0.9, 0.5, 0.1, 0.7]])
LEXICAL = torch.tensor([[0.0, 6.0, 3.0, 99.0]])
MASK = torch.tensor([[True, True, True, False]])


def test_candidates_of_both_sides_stand_once() -> None:
    positions, is_new = candidates_of(torch.tensor([[5, 2], [1, 0]]), torch.tensor([[2, 9], [3, 4]]))
    assert positions.tolist() == [[2, 2, 5, 9], [0, 1, 3, 4]]
    assert is_new.tolist() == [[True, False, True, True], [True, True, True, True]]


def test_weighted_sum_mixes_z_scores_over_the_candidates() -> None:
    # dense: mean .5, deviation sqrt(.32 / 3); lexical: mean 3, deviation sqrt(6)
    dense, lexical = 0.4 / (0.32 / 3) ** 0.5, 3 / 6**0.5
    fused = weighted_sum(DENSE, LEXICAL, MASK, 0.75)
    assert fused[0, :3].tolist() == pytest.approx([0.75 * dense - 0.25 * lexical, 0.25 * lexical, -0.75 * dense])
    assert fused[0, 3] == -torch.inf


def test_equal_scores_say_nothing() -> None:
    assert standardized(torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0, 0.0]]
    alone = torch.tensor([[True, False, False, False]])
    assert weighted_sum(DENSE, LEXICAL, alone, 0.5).tolist() == [[0.0, -torch.inf, -torch.inf, -torch.inf]]


def test_gradients_reach_the_dense_scores_and_the_weight() -> None:
    dense, weight = DENSE.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
    torch.softmax(weighted_sum(dense, LEXICAL, MASK, weight), dim=1)[0, 1].backward()
    assert dense.grad is not None
    assert weight.grad is not None
    assert bool(dense.grad[0, :3].ne(0).all())
    assert dense.grad[0, 3] == 0
    assert weight.grad != 0
    flat = torch.full((1, 3), 0.5, requires_grad=True)
    weighted_sum(flat, LEXICAL[:, :3], MASK[:, :3], 0.5).sum().backward()
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


def test_reciprocal_ranks_are_added_and_passages_without_a_word_have_none() -> None:
    fused = reciprocal_rank_fusion(DENSE, LEXICAL, MASK)
    assert fused[0, :3].tolist() == pytest.approx([1 / 61, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])
    assert fused[0, 3] == -torch.inf
    tied = reciprocal_rank_fusion(torch.tensor([[0.5, 0.5, 0.1]]), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert tied[0].tolist() == pytest.approx([2 / 61, 2 / 61, 1 / 63 + 1 / 61])


def test_the_best_come_first_and_equal_ones_by_position() -> None:
    scores, positions = best(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), torch.tensor([[2, 4, 7, 7]]), 3)
    assert (scores.tolist(), positions.tolist()) == ([[3.0, 3.0, 1.0]], [[4, 7, 2]])
