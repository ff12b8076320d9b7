"""LOOP, leave one out: a passage is worth what the likelihood of the answer loses when that passage is left out.

Atlas (arXiv 2208.03299, section 2.2); the loss itself is in `losses/loop.py`. For each query the language model reads
top_k prompts of top_k - 1 passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.losses import loop_loss
from fedrag_cli.trainers.config import LOOPConfig
from fedrag_cli.trainers.huggingface.lm_supervision import HuggingFaceTrainerForLMSupervision


class HuggingFaceTrainerForLOOP(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by leaving one passage out; arguments as `HuggingFaceTrainer`."""

    config: LOOPConfig

    def _default_config(self) -> LOOPConfig:
        return LOOPConfig()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """As the config says."""
        return self.config.likelihood

    def _contexts(self, nodes: Sequence[KnowledgeNode]) -> list[Sequence[KnowledgeNode]]:
        """Return, for each passage, all others, best first."""
        return [[*nodes[:left_out], *nodes[left_out + 1 :]] for left_out in range(len(nodes))]

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return loop_loss(scores, lm_scores, self.config.retriever_temperature, self.config.lm_temperature)

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        return torch.log_softmax(-lm_scores / self.config.lm_temperature, dim=1)
