"""Perplexity distillation: the retriever learns the distribution of the passages by the answer's perplexity.

Atlas (arXiv 2208.03299, section 2.2): KL(softmax(mean log-probability of the answer's tokens / lm_temperature) || P_R).
It is LSR with the forward divergence, the mean, and a sharper temperature.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedrag_cli.losses import lsr_loss
from fedrag_cli.trainers.config import PDistConfig
from fedrag_cli.trainers.huggingface.lm_supervision import HuggingFaceTrainerForLMSupervision


class HuggingFaceTrainerForPDist(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by perplexity distillation; arguments as `HuggingFaceTrainer`."""

    config: PDistConfig

    def _default_config(self) -> PDistConfig:
        return PDistConfig()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """The mean, which is minus the logarithm of the perplexity."""
        return "mean"

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return lsr_loss(scores, lm_scores, self.config.retriever_temperature, self.config.lm_temperature, "forward")

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        return torch.log_softmax(lm_scores / self.config.lm_temperature, dim=1)
