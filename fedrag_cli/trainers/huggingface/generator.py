"""What all trainers of the generator share: prompts with answers, and the loss on the answers' tokens alone."""

from __future__ import annotations

from abc import abstractmethod
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
from fedrag_cli.rag.generators.likelihood import accepted_arguments, padded
from fedrag_cli.rag.prompts import TruncationCount
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import GeneratorTrainingConfig
from fedrag_cli.trainers.huggingface.adapters import add_adapter
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.training_loop import IGNORED, Batches, LossFunction


@dataclass(frozen=True)
class Context:
    """What one prompt is written from.

    Args:
        example: The question and its answer.
        nodes: The passages, in the order of the prompt.
        weight: Factor of the instance's loss.
    """

    example: Example
    nodes: Sequence[KnowledgeNode]
    weight: float = 1.0


@dataclass(frozen=True)
class AnswerInstance:
    """One training sequence.

    Args:
        prompt: Token ids without loss.
        answer: Token ids with loss, the end token included.
        weight: Factor of its loss.
    """

    prompt: list[int]
    answer: list[int]
    weight: float = 1.0


def answer_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, weights: Tensor | None = None
) -> Tensor:
    """Return -sum w_j log p(y_t | prompt_j, y_<t) over the supervised tokens, divided by their number.

    Source: RA-DIT (arXiv 2310.01352, section 2.2) for the loss on the answer's tokens.

    Args:
        outputs: Of the language model; its logits may be those of the last positions only.
        labels: Token ids, or -100 where there is no loss, of shape (batch, tokens).
        num_items_in_batch: Supervised tokens of the whole optimizer step, over all accumulated batches.
        weights: Factor of each instance, shape (batch,); 1 where it is None.
    """
    logits = outputs.logits[:, :-1]
    targets = labels[:, -logits.shape[1] :]
    supervised = targets != IGNORED
    # Only the answers' rows are turned to float32: their logits are a vocabulary wide.
    rows, wanted = logits[supervised].float(), targets[supervised]
    if weights is None:
        loss = functional.cross_entropy(rows, wanted, reduction="sum")
    else:
        of_each = weights.to(rows)[:, None].expand_as(targets)[supervised]
        loss = (functional.cross_entropy(rows, wanted, reduction="none") * of_each).sum()
    return loss / (num_items_in_batch if num_items_in_batch is not None else supervised.sum())


class HuggingFaceTrainerForGenerator(HuggingFaceTrainer):
    """Tunes the generator on prompts with passages; arguments as `HuggingFaceTrainer`.

    With `lora` set the model becomes a `PeftModel` and only its adapters are tuned. Retrieval and tokenisation are
    done before the first step.
    """

    side = "generator"
    what = "generator"
    config: GeneratorTrainingConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Put the adapters on the model."""
        super().__init__(rag_system, *args, **kwargs)
        generator = rag_system.require_generator()
        if self.config.lora is not None:
            generator.model = add_adapter(generator.model, self.config.lora, self.seed)
        self._truncation = TruncationCount()
        self._supervised = 0
        self._total = 0

    @property
    def _generator(self) -> CausalLMGenerator:
        return self.rag_system.require_generator()

    @property
    def model(self) -> nn.Module:
        """The language model, adapters included."""
        model: nn.Module = self._generator.model
        return model

    @abstractmethod
    def contexts(self, examples: Sequence[Example]) -> list[Context]:
        """Retrieve passages for examples in one go and return what each prompt is written from."""

    def instances(self, examples: Sequence[Example], truncation: TruncationCount | None = None) -> list[AnswerInstance]:
        """Return the training sequences of examples.

        Args:
            examples: Questions with answers.
            truncation: Counts the prompts that were cut.

        Returns:
            One instance for each context that the objective makes of an example.
        """
        return [self._instance(context, truncation) for context in self.contexts(examples)]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the mean loss a supervised token on the validation examples, and what `extra_validation` adds."""
        instances = self.instances(self.validation_examples)
        totals = self._generator.log_probs_of_ids([(item.prompt, item.answer) for item in instances])
        weights = torch.tensor([item.weight for item in instances])
        tokens = sum(len(item.answer) for item in instances)
        loss = -(totals * weights).sum().item() / tokens
        return {"loss": loss, **(self.extra_validation() if self.extra_validation else {})}

    def _instance(self, context: Context, truncation: TruncationCount | None) -> AnswerInstance:
        example = context.example
        prompt = self._generator.prompts.encode_pair(example.query, context.nodes, example.response)
        if truncation is not None:
            truncation.add(prompt)
        return AnswerInstance(prompt.ids, prompt.answer, context.weight)

    def _prepare(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[AnswerInstance]:
        self._truncation = TruncationCount()
        instances = self.instances(self.train_examples, self._truncation)
        self._supervised = sum(len(item.answer) for item in instances)
        self._total = sum(len(item.prompt) + len(item.answer) for item in instances)
        return instances

    def _lengths(self, instances: Sequence[AnswerInstance]) -> list[int] | None:
        if not self.config.group_by_length:
            return None
        return [len(item.prompt) + len(item.answer) for item in instances]

    def _collate(self, instances: list[AnswerInstance]) -> dict[str, Any]:
        """Pad the instances and label their answers.

        Padding on the left lets all answers end together, so that logits are needed for the last columns only. A model
        that this would change gets its padding on the right.
        """
        rule = self._generator.padding_rule
        pairs = [(item.prompt, item.answer) for item in instances]
        input_ids, mask, starts = padded(pairs, self._generator.pad_id, "left" if rule.on_left else "right")
        labels = torch.full_like(input_ids, IGNORED)
        begins = [start + len(item.prompt) for start, item in zip(starts, instances, strict=True)]
        for row, (begin, item) in enumerate(zip(begins, instances, strict=True)):
            labels[row, begin : begin + len(item.answer)] = torch.tensor(item.answer)
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        if any(item.weight != 1.0 for item in instances):
            batch["weights"] = torch.tensor([item.weight for item in instances])
        if rule.on_left:
            batch |= rule.positions(mask)
        if "logits_to_keep" in accepted_arguments(self.model):
            # The first answer's first token is predicted one column earlier.
            batch["logits_to_keep"] = input_ids.shape[1] - min(begins) + 1
        return batch

    def _on_batches(self, batches: Batches) -> None:
        supervised = [batch["labels"] != IGNORED for batch in batches]
        # Rows without loss only fill up the share of a process.
        masks = [
            batch["attention_mask"][of_batch.any(dim=1)] for batch, of_batch in zip(batches, supervised, strict=True)
        ]
        tokens = sum(int(mask.sum()) for mask in masks)
        if tokens:
            count = sum(int(of_batch.sum()) for of_batch in supervised)
            self.diagnostics.add(tokens, supervised_share=count / tokens)

    def _loss_function(self) -> LossFunction:
        return answer_loss

    def _counts(self) -> dict[str, Any]:
        tokens = self._total - self._supervised + self._truncation.dropped_tokens
        return {
            "prompts": {**self._truncation.to_dict(), "tokens": tokens},
            "supervised_tokens": self._supervised,
            "total_tokens": self._total,
        }
