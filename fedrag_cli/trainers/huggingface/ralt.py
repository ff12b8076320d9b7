"""Retrieval-augmented tuning: the generator learns to answer from the retrieved passages.

RA-DIT's LM fine-tuning (arXiv 2310.01352, section 2.2): the loss is -sum log p(y_t | c, x, y_<t) over the answer's
tokens and its end token; prompt, context and padding carry no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedrag_cli.data.examples import Example
from fedrag_cli.trainers.config import RALTConfig
from fedrag_cli.trainers.huggingface.generator import Context, HuggingFaceTrainerForGenerator


class HuggingFaceTrainerForRALT(HuggingFaceTrainerForGenerator):
    """Tunes the generator on retrieved passages; arguments as `HuggingFaceTrainer`.

    With `lora` set the model becomes a `PeftModel` and only its adapters are tuned. Retrieval and tokenisation are
    done before the first step.
    """

    config: RALTConfig

    def _default_config(self) -> RALTConfig:
        return RALTConfig()

    def contexts(self, examples: Sequence[Example]) -> list[Context]:
        """Retrieve passages for examples in one go.

        Returns:
            One context for each example with `passages: together`, and one for each example and passage with
            `passages: separate`, whose weights are 1 or those of `passage_weights`.
        """
        found = self.rag_system.batch_retrieve([example.query for example in examples], self.config.top_k)
        result = []
        for example, scored in zip(examples, found, strict=True):
            nodes = [item.node for item in scored]
            if self.config.passages == "together":
                result.append(Context(example, nodes))
                continue
            weights = self._weights([item.score for item in scored])
            result += [Context(example, [node], weight) for node, weight in zip(nodes, weights, strict=True)]
        return result

    def _weights(self, scores: Sequence[float]) -> list[float]:
        """Return k * P_R for each of k passages, or 1 for each."""
        if self.config.passage_weights == "uniform":
            return [1.0] * len(scores)
        shares = torch.softmax(torch.tensor(scores) / self.config.retriever_temperature, dim=0)
        weights: list[float] = (len(scores) * shares).tolist()
        return weights
