"""Retrieval-augmented tuning: the generator learns to answer from the retrieved passages.

RA-DIT's LM fine-tuning (arXiv 2310.01352, section 2.2): the loss is -sum log p(y_t | c, x, y_<t) over the answer's
tokens and its end token; prompt, context and padding carry no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.prompts import TruncationCount
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import RALTConfig
from fedrag_cli.trainers.huggingface.adapters import add_adapter
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer

IGNORED = -100


@dataclass(frozen=True)
class RALTInstance:
    """One training sequence.

    Args:
        prompt: Token ids without loss.
        answer: Token ids with loss, the end token included.
    """

    prompt: list[int]
    answer: list[int]


class HuggingFaceTrainerForRALT(HuggingFaceTrainer):
    """Tunes the generator on retrieved passages; arguments as `HuggingFaceTrainer`.

    With `lora` set the model becomes a `PeftModel` and only its adapters are tuned. Retrieval and tokenisation are
    done before the first step.
    """

    side = "generator"
    what = "generator"
    config: RALTConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Put the adapters on the model."""
        super().__init__(rag_system, *args, **kwargs)
        generator = rag_system.require_generator()
        if self.config.lora is not None:
            generator.model = add_adapter(generator.model, self.config.lora, self.seed)
        self._truncation = TruncationCount()
        self._supervised = 0
        self._total = 0

    def _default_config(self) -> RALTConfig:
        return RALTConfig()

    @property
    def _generator(self) -> CausalLMGenerator:
        return self.rag_system.require_generator()

    @property
    def model(self) -> nn.Module:
        """The language model, adapters included."""
        model: nn.Module = self._generator.model
        return model

    def instances(self, examples: Sequence[Example]) -> list[RALTInstance]:
        """Retrieve passages for examples in one go and tokenise them.

        Args:
            examples: Questions with answers.

        Returns:
            One instance for each example with `passages: together`, and one for each example and passage with
            `passages: separate`.
        """
        found = self.rag_system.batch_retrieve([example.query for example in examples], self.config.top_k)
        result = []
        for example, scored in zip(examples, found, strict=True):
            nodes = [item.node for item in scored]
            contexts = [nodes] if self.config.passages == "together" else [[node] for node in nodes]
            result += [self._instance(example, context) for context in contexts]
        return result

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the mean loss a supervised token on the validation examples, and what `extra_validation` adds."""
        instances = self.instances(self.validation_examples)
        totals = self._generator.log_probs_of_ids([(item.prompt, item.answer) for item in instances])
        tokens = sum(len(item.answer) for item in instances)
        return {"loss": -totals.sum().item() / tokens, **(self.extra_validation() if self.extra_validation else {})}

    def _instance(self, example: Example, context: Sequence[KnowledgeNode]) -> RALTInstance:
        answer = self._generator.prompts.encode_answer(example.response)
        prompt = self._generator.encode_prompt(example.query, context, answer_tokens=len(answer))
        self._truncation.add(prompt)
        return RALTInstance(prompt.ids, answer)

    def _prepare(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[RALTInstance]:
        self._truncation = TruncationCount()
        instances = self.instances(self.train_examples)
        self._supervised = sum(len(item.answer) for item in instances)
        self._total = sum(len(item.prompt) + len(item.answer) for item in instances)
        return instances

    def _collate(self, instances: list[RALTInstance]) -> dict[str, Any]:
        """Pad on the right; mask and labels follow from the lengths, never from the padding token's id."""
        width = max(len(item.prompt) + len(item.answer) for item in instances)
        input_ids = torch.full((len(instances), width), self._generator.pad_id)
        labels = torch.full((len(instances), width), IGNORED)
        mask = torch.zeros((len(instances), width), dtype=torch.long)
        for row, item in enumerate(instances):
            length = len(item.prompt) + len(item.answer)
            input_ids[row, :length] = torch.tensor(item.prompt + item.answer)
            labels[row, len(item.prompt) : length] = torch.tensor(item.answer)
            mask[row, :length] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _counts(self) -> dict[str, Any]:
        return {
            "prompts": self._truncation.to_dict(),
            "supervised_tokens": self._supervised,
            "total_tokens": self._total,
        }
