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
from torch import Tensor, nn
from torch.nn import functional

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import accepted_arguments
from fedrag_cli.rag.prompts import TruncationCount
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import RALTConfig
from fedrag_cli.trainers.huggingface.adapters import add_adapter
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.loop import LossFunction

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


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return -sum log p(y_t | prompt, y_<t) over the supervised tokens, divided by their number.

    Args:
        outputs: Of the language model; its logits may be those of the last positions only.
        labels: Token ids, or -100 where there is no loss, of shape (batch, tokens).
        num_items_in_batch: Supervised tokens of the whole optimizer step, over all accumulated batches.
    """
    logits = outputs.logits[:, :-1]
    targets = labels[:, -logits.shape[1] :]
    supervised = targets != IGNORED
    # Only the answers' rows are turned to float32: their logits are a vocabulary wide.
    loss = functional.cross_entropy(logits[supervised].float(), targets[supervised], reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else supervised.sum())


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

    def instances(self, examples: Sequence[Example], truncation: TruncationCount | None = None) -> list[RALTInstance]:
        """Retrieve passages for examples in one go and tokenise them.

        Args:
            examples: Questions with answers.
            truncation: Counts the prompts that were cut.

        Returns:
            One instance for each example with `passages: together`, and one for each example and passage with
            `passages: separate`.
        """
        found = self.rag_system.batch_retrieve([example.query for example in examples], self.config.top_k)
        result = []
        for example, scored in zip(examples, found, strict=True):
            nodes = [item.node for item in scored]
            contexts = [nodes] if self.config.passages == "together" else [[node] for node in nodes]
            result += [self._instance(example, context, truncation) for context in contexts]
        return result

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the mean loss a supervised token on the validation examples, and what `extra_validation` adds."""
        instances = self.instances(self.validation_examples)
        totals = self._generator.log_probs_of_ids([(item.prompt, item.answer) for item in instances])
        tokens = sum(len(item.answer) for item in instances)
        return {"loss": -totals.sum().item() / tokens, **(self.extra_validation() if self.extra_validation else {})}

    def _instance(
        self, example: Example, context: Sequence[KnowledgeNode], truncation: TruncationCount | None
    ) -> RALTInstance:
        answer = self._generator.prompts.encode_answer(example.response)
        prompt = self._generator.encode_prompt(example.query, context, answer_tokens=len(answer))
        if truncation is not None:
            truncation.add(prompt)
        return RALTInstance(prompt.ids, answer)

    def _prepare(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[RALTInstance]:
        self._truncation = TruncationCount()
        instances = self.instances(self.train_examples, self._truncation)
        self._supervised = sum(len(item.answer) for item in instances)
        self._total = sum(len(item.prompt) + len(item.answer) for item in instances)
        return instances

    def _collate(self, instances: list[RALTInstance]) -> dict[str, Any]:
        """Pad on the left, so that all answers end together and logits are needed for the last columns only.

        Mask and labels follow from the lengths, never from the padding token's id.
        """
        width = max(len(item.prompt) + len(item.answer) for item in instances)
        input_ids = torch.full((len(instances), width), self._generator.pad_id)
        labels = torch.full((len(instances), width), IGNORED)
        mask = torch.zeros((len(instances), width), dtype=torch.long)
        for row, item in enumerate(instances):
            length = len(item.prompt) + len(item.answer)
            input_ids[row, width - length :] = torch.tensor(item.prompt + item.answer)
            labels[row, width - len(item.answer) :] = torch.tensor(item.answer)
            mask[row, width - length :] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        accepted = accepted_arguments(self.model)
        if "position_ids" in accepted:
            batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if "logits_to_keep" in accepted:
            batch["logits_to_keep"] = max(len(item.answer) for item in instances) + 1
        return batch

    def _loss_function(self) -> LossFunction:
        return answer_loss

    def _counts(self) -> dict[str, Any]:
        return {
            "prompts": self._truncation.to_dict(),
            "supervised_tokens": self._supervised,
            "total_tokens": self._total,
        }
