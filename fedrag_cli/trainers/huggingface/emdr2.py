"""EMDR2: the retriever learns to make the answer likely, summed over the passages.

Singh et al. (arXiv 2106.05346): -log sum_d P_R(d|x) p(y|d,x); the loss itself is in `losses/emdr2.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedrag_cli.losses import emdr2_loss
from fedrag_cli.trainers.config import EMDR2Config
from fedrag_cli.trainers.huggingface.lm_supervision import HuggingFaceTrainerForLMSupervision


class HuggingFaceTrainerForEMDR2(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by the marginal likelihood of the answer; arguments as `HuggingFaceTrainer`."""

    config: EMDR2Config

    def _default_config(self) -> EMDR2Config:
        return EMDR2Config()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """As the config says."""
        return self.config.likelihood

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return emdr2_loss(scores, lm_scores, self.config.retriever_temperature)

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        # The posterior of the passages under a retriever that prefers none: where it is flat, the gradient is 0.
        return torch.log_softmax(lm_scores, dim=1)
