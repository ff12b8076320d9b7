"""Trainers of the generator: prompts with answers, and the loss on the answers' tokens alone; RALT and RAFT."""

from __future__ import annotations

import difflib
import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import distinct_ids, first_ids, not_negatives
from fedrag_cli.errors import ConfigError
from fedrag_cli.rag.generators.base import TrainableGenerator
from fedrag_cli.rag.generators.likelihood import accepted_arguments, padded
from fedrag_cli.rag.lengths import TruncationCount
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import GeneratorTrainingConfig, LoRAConfig, RAFTConfig, RALTConfig
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.training_loop import IGNORED, Batches, LossFunction


def add_adapter(model: Any, config: LoRAConfig, seed: int) -> PeftModel:
    """Put a fresh LoRA adapter on a model; a model that has one already keeps it and goes on training it.

    Raises:
        ConfigError: The model has no layer of one of the wanted names, or its adapter has another shape.
    """
    if isinstance(model, PeftModel):
        _require_same_shape(model.peft_config[model.active_adapter], config)
        return _with_sorted_targets(model)
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    if not isinstance(targets, str):
        _require_layers(model, targets)
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return _with_sorted_targets(get_peft_model(model, settings))
        except (ValueError, re.error) as error:
            raise ConfigError(
                f"trainer.generator.lora.target_modules does not fit the model: {error}",
                "Use all-linear, or name layers of this model.",
            ) from error


def _require_layers(model: Any, targets: list[str]) -> None:
    """Raise ConfigError where a name is that of no layer; peft drops it in silence as long as others fit."""
    names = [name for name, _ in model.named_modules() if name]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if not unknown and targets:
        return
    layers = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _takes_adapter(module)})
    near = {name: difflib.get_close_matches(name.rpartition(".")[2], layers, n=2, cutoff=0.5) for name in unknown}
    listed = ", ".join(
        f"'{name}'" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else "")
        for name, close in near.items()
    )
    raise ConfigError(
        f"trainer.generator.lora.target_modules names no layer of the model: {listed or 'it is empty'}.",
        f"Use all-linear by itself, or name layers of this model: {', '.join(layers)}.",
    )


def _takes_adapter(module: Any) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _with_sorted_targets(model: PeftModel) -> PeftModel:
    """Keep the names of the layers in an order of their own; peft has a set, which each process writes otherwise."""
    for settings in model.peft_config.values():
        for field in ("target_modules", "exclude_modules"):
            if isinstance(getattr(settings, field, None), set):
                setattr(settings, field, sorted(getattr(settings, field)))
    return model


def _require_same_shape(present: LoraConfig, config: LoRAConfig) -> None:
    hint = "Make them equal, or start from the model without adapter."
    there = (present.r, float(present.lora_alpha), present.lora_dropout)
    if there != (config.r, float(config.alpha), config.dropout):
        raise ConfigError(
            f"The model has an adapter with r {present.r}, alpha {present.lora_alpha} and dropout "
            f"{present.lora_dropout} already, but trainer.generator.lora asks for r {config.r}, alpha {config.alpha} "
            f"and dropout {config.dropout}.",
            hint,
        )
    # `all-linear` was expanded to names when the adapter was made, so it cannot be compared any more.
    if not isinstance(config.target_modules, str) and set(config.target_modules) != set(present.target_modules or ()):
        raise ConfigError(
            f"The model has an adapter on {', '.join(sorted(present.target_modules or ()))} already, "
            f"but trainer.generator.lora.target_modules asks for {', '.join(config.target_modules)}.",
            hint,
        )


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
        generator = self._generator
        if self.config.lora is not None:
            generator.model = add_adapter(generator.model, self.config.lora, self.seed)
        self._truncation = TruncationCount()
        self._supervised = 0
        self._total = 0

    @property
    def _generator(self) -> TrainableGenerator:
        return self.rag_system.require_trainable_generator()

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
        prompt = self._generator.encode_pair(example.query, context.nodes, example.response)
        if truncation is not None:
            truncation.add(prompt.tokens, prompt.dropped_tokens)
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
        return {
            "prompts": self._truncation.to_dict(),
            "supervised_tokens": self._supervised,
            "total_tokens": self._total,
        }


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


class HuggingFaceTrainerForRAFT(HuggingFaceTrainerForGenerator):
    """Tunes the generator on relevant passages and distractors; arguments as `HuggingFaceTrainer`.

    Whether an example's prompt has its relevant passages, and the order of the passages, follow from the seed and the
    example's id alone: every epoch, every validation and a resumed run have the same prompts. Examples without relevant
    ids are left out and counted.
    """

    config: RAFTConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Keep the examples whose relevant passages are known."""
        super().__init__(rag_system, *args, **kwargs)
        self._left_out = self._keep_judged()
        # The rounds of a federation change `seed` for the order of the examples; their prompts stay.
        self._prompt_seed = self.seed

    def _default_config(self) -> RAFTConfig:
        return RAFTConfig()

    def contexts(self, examples: Sequence[Example]) -> list[Context]:
        """Choose relevant passages and distractors for examples with relevant ids; distractors are retrieved.

        What answers the question is no distractor: neither a relevant passage, nor one of another example that asks the
        same, nor a passage with the same text as one of these.

        Returns:
            One context for each example, of at most top_k passages.
        """
        if not examples:
            return []
        store, top_k = self.rag_system.knowledge_store, self.config.top_k
        nodes = {node.id: node for node in store.nodes}
        same = first_ids(nodes.values())
        known = (*self.train_examples, *self.validation_examples)
        spared = not_negatives(examples, known, same)
        most = max(len(names) for names in spared)
        found = self.rag_system.batch_retrieve([example.query for example in examples], min(len(store), top_k + most))
        result = []
        for example, never, scored in zip(examples, spared, found, strict=True):
            chance = random.Random(f"{self._prompt_seed}:{example.id}")
            with_gold = chance.random() < self.config.gold_share
            relevant = [nodes[name] for name in distinct_ids(example.relevant_ids, same)]
            gold = relevant[:top_k] if with_gold else []
            distractors = [item.node for item in scored if item.node.id not in never]
            context = gold + distractors[: top_k - len(gold)]
            chance.shuffle(context)
            result.append(Context(example, context))
        return result

    def _counts(self) -> dict[str, Any]:
        return {**super()._counts(), "without_relevant_ids": self._left_out}
