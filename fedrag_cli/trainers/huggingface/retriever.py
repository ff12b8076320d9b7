"""Trainers of the retriever: the encoders as a model with the loss as its output; contrastive learning."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedrag_cli.data.examples import Example
from fedrag_cli.data.relevance import distinct_ids, first_ids, not_negatives
from fedrag_cli.errors import DataError, TrainingError
from fedrag_cli.losses import contrastive_loss
from fedrag_cli.rag.retrievers.base import TrainableRetriever
from fedrag_cli.rag.system import RAGSystem, refresh_stale_store
from fedrag_cli.text import shape_text
from fedrag_cli.trainers.config import ContrastiveConfig, RetrieverTrainingConfig
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.training_loop import IGNORED, Batches


class EncoderModel(nn.Module):
    """The encoders that are trained, with the objective's loss as the output of `forward`.

    What is retrieved comes from the embeddings of the same forward pass that carries the gradient, so no query is
    encoded twice.

    Args:
        trainer: The trainer whose retriever and losses are used.
    """

    accepts_loss_kwargs = True

    def __init__(self, trainer: HuggingFaceTrainerForRetriever) -> None:
        """Register the encoders that are trained, and no other module."""
        super().__init__()
        # Kept out of the module tree: the language model in there is frozen and must not be saved or moved with it.
        self._trainer = [trainer]
        retriever = trainer.rag_system.require_trainable_retriever()
        self.query_encoder = retriever.query_encoder
        if trainer.config.train == "both" and not retriever.is_shared:
            self.passage_encoder = retriever.passage_encoder

    def train(self, mode: bool = True) -> EncoderModel:
        """Switch to training mode, with dropout only where the config wants it."""
        return super().train(mode and self._trainer[0].config.dropout)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return each tensor once: safetensors refuses the tied weights that some encoders have under two names."""
        known: set[int] = set()
        kept: dict[str, Any] = {}
        for name, tensor in super().state_dict(*args, **kwargs).items():
            if tensor.numel() == 0 or tensor.data_ptr() not in known:
                kept[name] = tensor
                known.add(tensor.data_ptr())
        return kept

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Let the encoders compute activations twice to save memory; transformers calls this by its name."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.activation_checkpointing_enable(**options)

    def forward(
        self,
        features: dict[str, Any],
        examples: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **shared: Tensor,
    ) -> dict[str, Tensor]:
        """Return the mean loss.

        Args:
            features: Tokenised queries.
            examples: Positions of the training instances, of shape (batch,).
            labels: Of shape (batch,), IGNORED where an example only fills the batch up; transformers counts the others.
            num_items_in_batch: Examples of the whole optimizer step, over all accumulated batches.
            **shared: What the objective put into its batches beside these.
        """
        counted = labels != IGNORED
        self._trainer[0].diagnostics.is_counting = bool(counted.all())
        losses = self._trainer[0].losses(features, examples.tolist(), **shared)
        if losses.shape != counted.shape:
            raise TrainingError(
                f"{type(self._trainer[0]).__name__} made losses of shape {shape_text(losses.shape)} for "
                f"{len(counted)} examples.",
                "It has to return one loss an example, not their mean.",
            )
        losses = losses * counted.to(losses.device)
        return {"loss": losses.sum() / (num_items_in_batch if num_items_in_batch is not None else len(losses))}


class HuggingFaceTrainerForRetriever(HuggingFaceTrainer):
    """Tunes the retriever; arguments as `HuggingFaceTrainer`.

    With `train: query` queries get a copy of the shared encoder and only that copy is tuned, so the knowledge store
    never goes stale. With `train: both` the passages of a batch are encoded anew with gradient, and the whole store is
    refreshed before each validation and at the end.
    """

    side = "retriever"
    what = "retriever"
    # Encoders may have layers that their embeddings do not depend on, such as BERT's pooler.
    has_unused_parameters = True
    config: RetrieverTrainingConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Give the queries an encoder of their own where only they are tuned."""
        super().__init__(rag_system, *args, **kwargs)
        if self.config.needs_generator:
            rag_system.require_generator()
        rag_system.require_matching_store()
        if self.config.train == "query":
            self._retriever.separate_encoders()
        self._model = EncoderModel(self)

    @property
    def model(self) -> nn.Module:
        """The encoders that are trained."""
        return self._model

    @property
    def _retriever(self) -> TrainableRetriever:
        return self.rag_system.require_trainable_retriever()

    @abstractmethod
    def losses(self, features: dict[str, Any], examples: Sequence[int], **shared: Tensor) -> Tensor:
        """Return the loss of each training instance, with gradient into the trained encoders.

        Returns:
            Tensor of shape (len(examples),).
        """

    @abstractmethod
    def _query_of(self, instance: int) -> str: ...

    def _passage_embeddings(self, positions: Tensor, device: torch.device) -> Tensor:
        """Return embeddings of one dimension more than `positions`, with gradient where passages are tuned too."""
        if self.config.train == "query":
            return self.rag_system.knowledge_store.embeddings_at(positions).to(device)
        unique, places = positions.unique(return_inverse=True)
        nodes = self.rag_system.knowledge_store.nodes_at(unique.tolist())
        features = self._retriever.features([node.text for node in nodes], queries=False)
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
        return self._retriever.embed(self._retriever.passage_encoder, moved)[places]

    def _collate(self, instances: list[int]) -> dict[str, Any]:
        return {
            "features": self._retriever.features([self._query_of(number) for number in instances], queries=True),
            "examples": torch.tensor(instances),
            "labels": torch.zeros(len(instances), dtype=torch.long),
        }

    def _refresh_passages(self) -> None:
        """Encode all passages anew where their encoder is tuned too and has changed since."""
        if self.config.train == "both":
            refresh_stale_store(self.rag_system)

    def _on_validation(self) -> None:
        self._refresh_passages()

    def _with_extra(self, loss: float) -> dict[str, float]:
        """Return the validation loss and what `extra_validation` adds."""
        return {"loss": loss, **(self.extra_validation() if self.extra_validation else {})}

    def _finish(self) -> None:
        self._refresh_passages()


@dataclass(frozen=True)
class Pair:
    """A query and one of its relevant passages; passages are positions in the knowledge store.

    Args:
        query: The query.
        passage: The relevant passage.
        relevant: What is never a negative of the query: all its relevant passages, those of other examples that ask the
            same, and further passages with the same text as one of these.
        negatives: The mined ones.
    """

    query: str
    passage: int
    relevant: frozenset[int]
    negatives: tuple[int, ...]


class HuggingFaceTrainerForContrastive(HuggingFaceTrainerForRetriever):
    """Tunes the retriever by multiple negatives ranking; arguments as `HuggingFaceTrainer`.

    The negatives of a query are the passages of its whole optimizer step, but for those that answer it too (see
    `Pair.relevant`), so accumulated batches learn what one large batch learns; with `train: both` each of these batches
    therefore encodes all passages of the step. Examples without relevant ids are left out and counted.
    """

    config: ContrastiveConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Keep the examples whose relevant passages are known, and mine the negatives of the validation."""
        super().__init__(rag_system, *args, **kwargs)
        self._left_out = self._keep_judged()
        self._pairs: list[Pair] = []
        # Mined once, so that validation losses can be compared however often training starts anew.
        self._validation_pairs = self.pairs(self.validation_examples)

    def _default_config(self) -> ContrastiveConfig:
        return ContrastiveConfig()

    def require_ready(self) -> None:
        """Check also that there is a passage to tell a relevant one from."""
        super().require_ready()
        relevant = {name for example in self.train_examples for name in example.relevant_ids}
        if not self.config.hard_negatives and len(relevant) < 2:
            raise DataError(
                "All training examples have the same relevant passage, so that nothing is a negative.",
                "Add examples with other relevant passages, or set hard_negatives to 1 or more.",
            )

    def pairs(self, examples: Sequence[Example]) -> list[Pair]:
        """Return a pair for each example and relevant passage, with negatives by the retriever as it is now.

        Args:
            examples: Queries with relevant ids that name passages of the store.
        """
        if not examples:
            return []
        store, wanted = self.rag_system.knowledge_store, self.config.hard_negatives
        nodes = store.nodes
        places, same = {node.id: position for position, node in enumerate(nodes)}, first_ids(nodes)
        relevant = [[places[name] for name in distinct_ids(example.relevant_ids, same)] for example in examples]
        known = (*self.train_examples, *self.validation_examples)
        spared = [frozenset(places[name] for name in names) for names in not_negatives(examples, known, same)]
        found: list[list[int]] = [[] for _ in examples]
        if wanted:
            queries = [example.query for example in examples]
            depth = min(len(store), wanted + max(len(positions) for positions in spared))
            found = self.rag_system.search(queries, self._retriever.encode_queries(queries), depth)[1].tolist()
        return [
            Pair(example.query, position, never, tuple(place for place in row if place not in never)[:wanted])
            for example, own, never, row in zip(examples, relevant, spared, found, strict=True)
            for position in own
        ]

    def losses(self, features: dict[str, Any], examples: Sequence[int], **shared: Tensor) -> Tensor:
        """Return the loss of each pair among the passages of its optimizer step (`step`: positions of its pairs)."""
        queries = self._retriever.embed(self._retriever.query_encoder, features)
        step: list[int] = shared["step"].tolist()
        own = [step.index(number) for number in examples]
        return self._losses(queries, own, [self._pairs[number] for number in step])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the loss on the validation pairs, in batches, and what `extra_validation` adds."""
        self._refresh_passages()
        queries = self._retriever.encode_queries([pair.query for pair in self._validation_pairs])
        total = 0.0
        for start in range(0, len(queries), self.config.batch_size):
            batch = self._validation_pairs[start : start + self.config.batch_size]
            embeddings = queries[start : start + self.config.batch_size]
            total += self._losses(embeddings, range(len(batch)), batch).sum().item()
        return self._with_extra(total / len(queries))

    def _losses(self, queries: Tensor, own: Sequence[int], columns: Sequence[Pair]) -> Tensor:
        """Return the loss of queries, which belong to the columns `own`."""
        positions = [pair.passage for pair in columns] + [place for pair in columns for place in pair.negatives]
        passages = self._passage_embeddings(torch.tensor(positions), queries.device)
        excluded = torch.tensor([[place in columns[number].relevant for place in positions] for number in own])
        excluded[range(len(own)), own] = False
        with torch.autocast(queries.device.type, enabled=False):
            similarities = queries.float() @ passages.float().T
        return contrastive_loss(
            similarities[:, : len(columns)],
            similarities[:, len(columns) :],
            self.config.scale,
            excluded.to(queries.device),
            torch.tensor(own, device=queries.device),
        )

    def _prepare(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[int]:
        """Mine the negatives; a resumed run does so before it loads its checkpoint, and finds the same ones."""
        self._pairs = self.pairs(self.train_examples)
        return range(len(self._pairs))

    def _prepared(self) -> list[Pair]:
        return self._pairs

    def _take_over(self, prepared: list[Pair], resuming: Path | None) -> None:
        self._pairs = prepared

    def _query_of(self, instance: int) -> str:
        return self._pairs[instance].query

    def _on_batches(self, batches: Batches) -> None:
        if batches:
            own = torch.cat([batch["examples"][batch["labels"] != IGNORED] for batch in batches])
            step = torch.cat(self.processes.all_gather(own))
            for batch in batches:
                batch["step"] = step

    def _counts(self) -> dict[str, Any]:
        return {"pairs": len(self._pairs), "without_relevant_ids": self._left_out}
