"""Losses and likelihoods: pure functions of tensors."""

from fedrag_cli.losses.contrastive import contrastive_loss
from fedrag_cli.losses.lsr import LSRLoss, lsr_loss
from fedrag_cli.losses.marginal import (
    emdr2_loss,
    ensemble_log_probs,
    loop_loss,
    passage_log_weights,
    sequence_log_prob,
    token_log_prob,
)
from fedrag_cli.losses.proximal import proximal_penalty

__all__ = [
    "LSRLoss",
    "contrastive_loss",
    "emdr2_loss",
    "ensemble_log_probs",
    "loop_loss",
    "lsr_loss",
    "passage_log_weights",
    "proximal_penalty",
    "sequence_log_prob",
    "token_log_prob",
]
