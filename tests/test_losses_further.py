"""EMDR2, contrastive loss and marginal likelihoods, with the expected numbers of their definitions."""

from __future__ import annotations

import pytest
import torch

from fedrag_cli.errors import TrainingError
from fedrag_cli.losses import (
    contrastive_loss,
    emdr2_loss,
    ensemble_log_probs,
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
