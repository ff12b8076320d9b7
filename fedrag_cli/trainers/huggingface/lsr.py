"""LM-supervised retrieval: the language model's likelihood of the answer teaches the retriever its ranking.

REPLUG (arXiv 2301.12652), RA-DIT (arXiv 2310.01352); the loss itself is in `losses/lsr.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedrag_cli.losses import lsr_loss
from fedrag_cli.trainers.config import LSRConfig
from fedrag_cli.trainers.huggingface.lm_supervision import HuggingFaceTrainerForLMSupervision


class HuggingFaceTrainerForLSR(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by LM-supervised retrieval; arguments as `HuggingFaceTrainer`.

    With `train: query` queries get a copy of the shared encoder and only that copy is tuned, so the knowledge store
    never goes stale. With `train: both` the retrieved passages are encoded anew with gradient, and the whole store is
    refreshed every `refresh_every` steps, before each validation, and at the end.
    """

    config: LSRConfig

    def _default_config(self) -> LSRConfig:
        return LSRConfig()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """As the config says."""
        return self.config.likelihood

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return lsr_loss(
            scores, lm_scores, self.config.retriever_temperature, self.config.lm_temperature, self.config.divergence
        )

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        return torch.log_softmax(lm_scores / self.config.lm_temperature, dim=1)
