"""EMDR2, LOOP, PDist, contrastive loss and marginal likelihoods, with the expected numbers of their definitions."""

from __future__ import annotations

import pytest
import torch

from fedrag_cli.errors import TrainingError
from fedrag_cli.losses import (
    contrastive_loss,
    emdr2_loss,
    ensemble_log_probs,
    loop_loss,
    lsr_loss,
    passage_log_weights,
    sequence_log_prob,
    token_log_prob,
)


def test_emdr2_loss_and_gradient() -> None:
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    log_probs = torch.tensor([[0.2, 0.6]], dtype=torch.float64).log().requires_grad_()
    loss = emdr2_loss(scores, log_probs)
    assert loss.item() == pytest.approx(1.179031, abs=1e-6)
    loss.sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(
        scores.grad, torch.tensor([[0.255692, -0.255692]], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert log_probs.grad is None


def test_emdr2_survives_tiny_likelihoods() -> None:
    loss = emdr2_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[-1000.0, -1001.0]]))
    assert loss.item() == pytest.approx(1000 + 0.693147 - 0.313262, abs=1e-3)


def test_emdr2_refuses_what_does_not_fit() -> None:
    with pytest.raises(TrainingError, match="shape"):
        emdr2_loss(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(TrainingError, match="temperature"):
        emdr2_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)


def test_contrastive_loss() -> None:
    cosines = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    assert contrastive_loss(cosines).mean().item() == pytest.approx(1.67759e-4, rel=1e-5)
    hard = torch.tensor([[0.8, 0.2], [0.1, 0.6]], dtype=torch.float64)
    assert contrastive_loss(cosines, hard).mean().item() == pytest.approx(0.127079, abs=1e-6)


def test_contrastive_loss_refuses_what_does_not_fit() -> None:
    with pytest.raises(TrainingError, match="expected \\(batch, batch\\)"):
        contrastive_loss(torch.zeros(2, 3))
    with pytest.raises(TrainingError, match="expected \\(2, negatives\\)"):
        contrastive_loss(torch.zeros(2, 2), torch.zeros(3, 1))


def test_contrastive_loss_without_excluded_columns() -> None:
    """By hand: log(1 + e^-16 + e^-14) for the first query, log(1 + e^-8 + e^-12) for the second."""
    cosines = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    hard = torch.tensor([[0.8, 0.2], [0.1, 0.6]], dtype=torch.float64)
    excluded = torch.tensor([[False, False, True, False], [False, False, False, True]])
    losses = contrastive_loss(cosines, hard, excluded=excluded)
    torch.testing.assert_close(losses, torch.tensor([9.440634e-7, 3.415485e-4], dtype=torch.float64), rtol=1e-6, atol=0)
    everything = torch.tensor([[False, True, True, True], [True, False, True, True]])
    assert contrastive_loss(cosines, hard, excluded=everything).tolist() == [0.0, 0.0]


def test_contrastive_loss_of_some_rows_is_that_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines, hard = torch.rand(4, 4, generator=generator), torch.rand(4, 3, generator=generator)
    everything = contrastive_loss(cosines, hard)
    part = contrastive_loss(cosines[1:3], hard[1:3], own=torch.tensor([1, 2]))
    torch.testing.assert_close(part, everything[1:3])


def test_excluded_columns_get_no_gradient() -> None:
    cosines = torch.tensor([[0.5, 0.5], [0.5, 0.5]], requires_grad=True)
    contrastive_loss(cosines, excluded=torch.tensor([[False, True], [False, False]])).sum().backward()
    assert cosines.grad is not None
    torch.testing.assert_close(cosines.grad, torch.tensor([[0.0, 0.0], [10.0, -10.0]]))


def test_contrastive_loss_refuses_masks_that_do_not_fit() -> None:
    with pytest.raises(TrainingError, match=r"it must be \(2, 2\) and boolean"):
        contrastive_loss(torch.zeros(2, 2), excluded=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(TrainingError, match="own passage is excluded"):
        contrastive_loss(torch.zeros(2, 2), excluded=torch.eye(2, dtype=torch.bool))
    with pytest.raises(TrainingError, match=r"own has the shape \(1,\)"):
        contrastive_loss(torch.zeros(2, 3), own=torch.zeros(1, dtype=torch.long))


def test_loop_loss_and_gradient() -> None:
    """Without the first passage the answer is least likely, so it is worth most: Q = softmax([4, 2, 1])."""
    scores = torch.tensor([[0.9, 0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    without = torch.tensor([[-4.0, -2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = loop_loss(scores, without, 1.0, 1.0)
    assert loss.item() == pytest.approx(0.306270, abs=1e-6)
    loss.sum().backward()
    assert scores.grad is not None
    expected = torch.tensor([[-0.372019, 0.202046, 0.169973]], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, expected, atol=1e-6, rtol=0)
    assert without.grad is None


def test_perplexity_distillation_at_its_own_temperatures() -> None:
    """Mean log-probabilities -1, -1.01, -1.03 at 0.01: Q = softmax([0, -1, -3]); cosines at 0.05: P = [18, 17, 16]."""
    loss = lsr_loss(torch.tensor([[0.9, 0.85, 0.8]]), torch.tensor([[-1.0, -1.01, -1.03]]), 0.05, 0.01)
    assert loss.item() == pytest.approx(0.023475, abs=1e-5)


def test_ensemble_in_log_space() -> None:
    weights = passage_log_weights(torch.tensor([0.75, 0.25]).log())
    mixed = ensemble_log_probs(weights, torch.tensor([[0.8, 0.2], [0.1, 0.9]]).log())
    torch.testing.assert_close(mixed.exp(), torch.tensor([0.625, 0.375]))
    assert mixed.exp().sum().item() == pytest.approx(1.0)


def test_rag_sequence_and_rag_token() -> None:
    priors = torch.tensor([0.6, 0.4]).log()
    tokens = torch.tensor([[0.5, 0.2], [0.1, 0.9]]).log()
    assert sequence_log_prob(priors, tokens).exp().item() == pytest.approx(0.096)
    assert token_log_prob(priors, tokens).exp().item() == pytest.approx(0.1632)
