"""The trainer of the objective in `plugin_components`."""

from __future__ import annotations

from typing import Literal

import torch
from plugin_components import MarginConfig
from torch import Tensor

from fedrag_cli.trainers.huggingface.lm_supervision import HuggingFaceTrainerForLMSupervision


class MarginTrainer(HuggingFaceTrainerForLMSupervision):
    config: MarginConfig

    def _default_config(self) -> MarginConfig:
        return MarginConfig()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        return "mean"

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        best = scores.gather(1, lm_scores.argmax(dim=1, keepdim=True))
        return (self.config.margin - best + scores).clamp(min=0).sum(dim=1)

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        return torch.log_softmax(lm_scores, dim=1)
