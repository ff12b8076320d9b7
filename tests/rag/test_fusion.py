"""Fusion of dense and lexical scores: the formulas, masks, equal scores and gradients."""

from __future__ import annotations

import pytest
import torch

from fedrag_cli.rag.fusion import best, candidates_of, lexical_bonus, reciprocal_rank_fusion

DENSE = torch.tensor([[0.9, 0.5, 0.1, 0.7]])
LEXICAL = torch.tensor([[0.0, 6.0, 3.0, 99.0]])
MASK = torch.tensor([[True, True, True, False]])


def test_candidates_of_both_sides_stand_once() -> None:
    positions, is_new = candidates_of(torch.tensor([[5, 2], [1, 0]]), torch.tensor([[2, 9], [3, 4]]))
    assert positions.tolist() == [[2, 2, 5, 9], [0, 1, 3, 4]]
    assert is_new.tolist() == [[True, False, True, True], [True, True, True, True]]


def test_ranking_with_the_bonus_is_ranking_by_the_mean_of_z_scores() -> None:
    # dense: mean .5, deviation sqrt(.32 / 3); lexical: mean 3, deviation sqrt(6)
    deviation, z = (0.32 / 3) ** 0.5, 3 / 6**0.5
    bonus = lexical_bonus(DENSE, LEXICAL, MASK, 0.75)
    assert bonus[0].tolist() == pytest.approx([-z * deviation / 3, z * deviation / 3, 0, 0])
    mixed = [0.75 * 0.4 / deviation - 0.25 * z, 0.25 * z, 0.75 * -0.4 / deviation]
    fused = (DENSE + bonus)[0, :3]
    assert ((fused - 0.5) * 0.75 / deviation).tolist() == pytest.approx(mixed)


def test_equal_scores_of_one_side_leave_the_order_to_the_other() -> None:
    flat, every = torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)
    assert lexical_bonus(DENSE[:, :3], flat, every, 0.5).tolist() == [[0.0, 0.0, 0.0]]
    assert lexical_bonus(flat, LEXICAL[:, :3], every, 0.5)[0].argsort().tolist() == [0, 2, 1]
    alone = torch.tensor([[True, False, False, False]])
    assert lexical_bonus(DENSE, LEXICAL, alone, 0.5).tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert not lexical_bonus(DENSE, LEXICAL, MASK, 1.0).any()


def test_gradients_are_finite_and_reach_the_weight() -> None:
    dense, weight = DENSE.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
    torch.softmax(dense + lexical_bonus(dense, LEXICAL, MASK, weight), dim=1)[0, 1].backward()
    assert weight.grad is not None
    assert weight.grad != 0
    flat = torch.full((1, 3), 0.5, requires_grad=True)
    lexical_bonus(flat, LEXICAL[:, :3], MASK[:, :3], 0.5).square().sum().backward()
    for tensor in (dense, flat):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())


def test_reciprocal_ranks_are_added_and_passages_without_a_word_have_none() -> None:
    fused = reciprocal_rank_fusion(DENSE, LEXICAL, MASK)
    assert fused[0, :3].tolist() == pytest.approx([1 / 61, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])
    assert fused[0, 3] == -torch.inf
    tied = reciprocal_rank_fusion(torch.tensor([[0.5, 0.5, 0.1]]), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert tied[0].tolist() == pytest.approx([2 / 61, 2 / 61, 1 / 63 + 1 / 61])


def test_the_best_come_first_and_equal_ones_by_position() -> None:
    scores, positions = best(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), torch.tensor([[2, 4, 7, 7]]), 3)
    assert (scores.tolist(), positions.tolist()) == ([[3.0, 3.0, 1.0]], [[4, 7, 2]])
