"""Losses: pure functions of tensors."""

from fedrag_cli.losses.lsr import LSRLoss, lsr_loss
from fedrag_cli.losses.proximal import proximal_penalty

__all__ = ["LSRLoss", "lsr_loss", "proximal_penalty"]
