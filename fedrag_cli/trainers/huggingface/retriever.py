"""What all trainers of the retriever share: the encoders as a model with the loss as its output, and their gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem, refresh_stale_store
from fedrag_cli.trainers.config import RetrieverTrainingConfig
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.training_loop import IGNORED


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
        retriever = trainer.rag_system.retriever
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
            rag_system.retriever.separate_encoders()
        self._model = EncoderModel(self)

    @property
    def model(self) -> nn.Module:
        """The encoders that are trained."""
        return self._model

    @property
    def _retriever(self) -> SentenceTransformerRetriever:
        return self.rag_system.retriever

    @abstractmethod
    def losses(self, features: dict[str, Any], examples: Sequence[int], **shared: Tensor) -> Tensor:
        """Return the loss of each training instance, with gradient into the trained encoders.

        Args:
            features: Tokenised queries of the instances.
            examples: Positions of the instances among those that `_prepare` gave.
            **shared: What the objective put into its batches beside these.

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
