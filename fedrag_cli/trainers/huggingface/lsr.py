"""LM-supervised retrieval: the language model's likelihood of the answer teaches the retriever its ranking.

REPLUG (arXiv 2301.12652), RA-DIT (arXiv 2310.01352); the loss itself is in `losses/lsr.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.losses import lsr_loss
from fedrag_cli.rag.prompts import TruncationCount
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem, refresh_store
from fedrag_cli.trainers.config import LSRConfig
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.checks import require_peaked_targets
from fedrag_cli.trainers.huggingface.scoring import LikelihoodScorer

INDEX_FILE = "index.safetensors"


class LSRModel(nn.Module):
    """The encoders that LSR trains, with its loss as the output of `forward`.

    Retrieval uses the embeddings of the same forward pass that carries the gradient, so no query is encoded twice.

    Args:
        trainer: The trainer whose retriever, store and likelihoods are used.
    """

    accepts_loss_kwargs = True

    def __init__(self, trainer: HuggingFaceTrainerForLSR) -> None:
        """Register the encoders that are trained, and no other module."""
        super().__init__()
        # Kept out of the module tree: the language model in there is frozen and must not be saved or moved with it.
        self._trainer = [trainer]
        retriever = trainer.rag_system.retriever
        self.query_encoder = retriever.query_encoder
        if trainer.config.train == "both" and not retriever.is_shared:
            self.passage_encoder = retriever.passage_encoder

    def train(self, mode: bool = True) -> LSRModel:
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
        self, features: dict[str, Any], examples: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """Return the mean LSR loss.

        Args:
            features: Tokenised queries.
            examples: Positions of the training examples, of shape (batch,).
            labels: Anything of shape (batch,); transformers counts the examples by it.
            num_items_in_batch: Examples of the whole optimizer step, over all accumulated batches.
        """
        losses = self._trainer[0].losses(features, examples.tolist())
        return {"loss": losses.sum() / (num_items_in_batch if num_items_in_batch is not None else len(losses))}


class HuggingFaceTrainerForLSR(HuggingFaceTrainer):
    """Tunes the retriever by LM-supervised retrieval; arguments as `HuggingFaceTrainer`.

    With `train: query` queries get a copy of the shared encoder and only that copy is tuned, so the knowledge store
    never goes stale. With `train: both` the retrieved passages are encoded anew with gradient, and the whole store is
    refreshed every `refresh_every` steps, before each validation, and at the end.
    """

    side = "retriever"
    what = "retriever"
    config: LSRConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Give the queries an encoder of their own where only they are tuned."""
        super().__init__(rag_system, *args, **kwargs)
        rag_system.require_generator()
        rag_system.require_matching_store()
        if self.config.train == "query":
            rag_system.retriever.separate_encoders()
        self._model = LSRModel(self)
        self._scorer: LikelihoodScorer | None = None
        self._truncation = TruncationCount()

    def _default_config(self) -> LSRConfig:
        return LSRConfig()

    @property
    def model(self) -> nn.Module:
        """The encoders that are trained."""
        return self._model

    @property
    def _retriever(self) -> SentenceTransformerRetriever:
        return self.rag_system.retriever

    def losses(self, features: dict[str, Any], examples: Sequence[int]) -> Tensor:
        """Return the LSR loss of each training example, with gradient into the trained encoders.

        Args:
            features: Tokenised queries of the examples.
            examples: Positions in `train_examples`.

        Returns:
            Tensor of shape (len(examples),).
        """
        queries = self._retriever.embed(self._retriever.query_encoder, features)
        store = self.rag_system.knowledge_store
        positions = store.search_positions(queries.detach(), self.config.top_k)[1]
        passages = self._passage_embeddings(positions, queries.device)
        # bfloat16 has three digits; a difference of scores below 0.004 would be lost, before it is divided by tau.
        with torch.autocast(queries.device.type, enabled=False):
            scores = torch.einsum("bd,bkd->bk", queries.float(), passages.float())
        lm_scores = self._lm_scores([self.train_examples[example] for example in examples], positions)
        return self._loss(scores, lm_scores.to(scores.device))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the LSR loss on the validation examples, and what `extra_validation` adds."""
        if self.config.train == "both":
            refresh_store(self.rag_system)
        embeddings = self._retriever.encode_queries([example.query for example in self.validation_examples])
        scores, positions = self.rag_system.knowledge_store.search_positions(embeddings, self.config.top_k)
        losses = self._loss(scores, self._lm_scores(self.validation_examples, positions).to(scores.device))
        return {"loss": losses.mean().item(), **(self.extra_validation() if self.extra_validation else {})}

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return lsr_loss(
            scores, lm_scores, self.config.retriever_temperature, self.config.lm_temperature, self.config.divergence
        )

    def _passage_embeddings(self, positions: Tensor, device: torch.device) -> Tensor:
        """Return embeddings of shape (batch, top_k, dimension), with gradient where passages are tuned too."""
        if self.config.train == "query":
            return self.rag_system.knowledge_store.embeddings_at(positions).to(device)
        unique, places = positions.unique(return_inverse=True)
        nodes = self.rag_system.knowledge_store.nodes_at(unique.tolist())
        features = self._retriever.features([node.text for node in nodes], queries=False)
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
        return self._retriever.embed(self._retriever.passage_encoder, moved)[places]

    def _lm_scores(self, examples: Sequence[Example], positions: Tensor, *, show: bool = False) -> Tensor:
        """Return the language model's scores of shape (examples, top_k), cached by example and passage."""
        store = self.rag_system.knowledge_store
        pairs: list[tuple[Example, KnowledgeNode]] = [
            (example, node)
            for example, row in zip(examples, positions.tolist(), strict=True)
            for node in store.nodes_at(row)
        ]
        totals, lengths = self._scoring().score(pairs, self.reporter if show else None)
        scores = totals / lengths if self.config.likelihood == "mean" else totals
        return scores.view(len(examples), -1)

    def _scoring(self) -> LikelihoodScorer:
        """Return the scorer of the generator as it is now; the generator may have been tuned since the last call."""
        generator = self.rag_system.require_generator()
        if self._scorer is None or self._scorer.fingerprint != generator.fingerprint():
            self._scorer = LikelihoodScorer(generator, self.cache_directory)
        return self._scorer

    def _prepare(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[int]:
        """Score the passages that the untuned retriever finds, in one go, and check that they teach something."""
        generator = self.rag_system.require_generator()
        if self._scorer is None or not self._scorer.serves(generator, cache_directory):
            self._scorer = LikelihoodScorer(generator, cache_directory)
        store = self.rag_system.knowledge_store
        embeddings = self._retriever.encode_queries([example.query for example in self.train_examples])
        positions = store.search_positions(embeddings, self.config.top_k)[1]
        scores = self._lm_scores(self.train_examples, positions, show=True)
        self._truncation = self._scoring().truncation
        require_peaked_targets(torch.softmax(scores / self.config.lm_temperature, dim=1), self.config.lm_temperature)
        if resuming is not None and self.config.train == "both":
            store.replace_embeddings(load_file(resuming / INDEX_FILE)["embeddings"])
        return range(len(self.train_examples))

    def _collate(self, instances: list[int]) -> dict[str, Any]:
        queries = [self.train_examples[position].query for position in instances]
        return {
            "features": self._retriever.features(queries, queries=True),
            "examples": torch.tensor(instances),
            "labels": torch.zeros(len(instances), dtype=torch.long),
        }

    def _on_step(self, step: int) -> None:
        if self.config.train == "both" and step % self._refresh_every() == 0:
            refresh_store(self.rag_system)

    def _refresh_every(self) -> int:
        per_step = self.config.batch_size * self.config.gradient_accumulation_steps
        return self.config.refresh_every or math.ceil(len(self.train_examples) / per_step)

    def _on_checkpoint(self, directory: Path) -> None:
        if self.config.train == "both":
            save_file({"embeddings": self.rag_system.knowledge_store.embeddings.contiguous()}, directory / INDEX_FILE)

    def _finish(self) -> None:
        if self.config.train == "both":
            refresh_store(self.rag_system)

    def _counts(self) -> dict[str, Any]:
        return {"scoring": self._truncation.to_dict(), "scored_pairs": len(self._scoring().cache)}
