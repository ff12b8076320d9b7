"""The objectives in which the frozen language model teaches the retriever."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError
from fedrag_cli.losses import emdr2_loss, loop_loss, lsr_loss
from fedrag_cli.rag.lengths import TruncationCount
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import EMDR2Config, LMSupervisedConfig, LOOPConfig, LSRConfig, PDistConfig
from fedrag_cli.trainers.huggingface.checks import require_peaked_targets
from fedrag_cli.trainers.huggingface.retriever import HuggingFaceTrainerForRetriever
from fedrag_cli.trainers.huggingface.scoring import LikelihoodScorer

INDEX_FILE = "index.safetensors"


class HuggingFaceTrainerForLMSupervision(HuggingFaceTrainerForRetriever):
    """Tunes the retriever on what the language model makes of the retrieved passages; arguments as for all trainers.

    With `train: both` the whole store is refreshed every `refresh_every` steps too, because it is searched at every
    step.
    """

    config: LMSupervisedConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Start without likelihoods; they are computed when they are asked for."""
        super().__init__(rag_system, *args, **kwargs)
        self._scorer: LikelihoodScorer | None = None
        self._truncation = TruncationCount()

    @property
    @abstractmethod
    def likelihood(self) -> Literal["mean", "sum"]:
        """What the language model's score of an answer is: the mean of its tokens' log-probabilities, or their sum."""

    @abstractmethod
    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        """Return the loss of each example; both arguments have the shape (examples, top_k)."""

    @abstractmethod
    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        """Return the log-probabilities of the passages, (examples, top_k), that the language model teaches."""

    def _contexts(self, nodes: Sequence[KnowledgeNode]) -> list[Sequence[KnowledgeNode]]:
        """Return the passages of each prompt that is scored for one query: each retrieved one by itself."""
        return [[node] for node in nodes]

    def require_ready(self) -> None:
        """Check also that the fused scores have a gradient."""
        hybrid = self.rag_system.hybrid
        if hybrid is not None and hybrid.settings.method != "weighted":
            raise ConfigError(
                f"A ranking by {hybrid.settings.method} has no gradient to tune the retriever by.",
                "Set rag_system.fusion.method to weighted.",
            )
        super().require_ready()

    def losses(self, features: dict[str, Any], examples: Sequence[int], **shared: Tensor) -> Tensor:
        """Return the loss of each training example; see `HuggingFaceTrainerForRetriever.losses`."""
        queries = self._retriever.embed(self._retriever.query_encoder, features)
        texts = [self.train_examples[example].query for example in examples]
        fused, positions = self.rag_system.search(texts, queries.detach(), self.config.top_k)
        passages = self._passage_embeddings(positions, queries.device)
        # bfloat16 has three digits; a difference of scores below 0.004 would be lost, before it is divided by tau.
        with torch.autocast(queries.device.type, enabled=False):
            scores = torch.einsum("bd,bkd->bk", queries.float(), passages.float())
            if self.rag_system.hybrid is not None:
                scores = scores + self._lexical_bonus(queries.detach(), positions, fused)
        lm_scores = self._lm_scores([self.train_examples[example] for example in examples], positions)
        lm_scores = lm_scores.to(scores.device)
        self._diagnose(scores.detach(), lm_scores)
        return self._loss(scores, lm_scores)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the loss on the validation examples, and what `extra_validation` adds."""
        self._refresh_passages()
        queries = [example.query for example in self.validation_examples]
        embeddings = self._retriever.encode_queries(queries)
        scores, positions = self.rag_system.search(queries, embeddings, self.config.top_k)
        losses = self._loss(scores, self._lm_scores(self.validation_examples, positions).to(scores.device))
        return self._with_extra(losses.mean().item())

    def _lexical_bonus(self, queries: Tensor, positions: Tensor, fused: Tensor) -> Tensor:
        """Return what the words have added to the similarities of retrieved passages, (examples, top_k)."""
        found = self.rag_system.knowledge_store.embeddings_at(positions).to(queries.device)
        return fused.to(queries.device) - torch.einsum("bd,bkd->bk", queries.float(), found.float())

    def _diagnose(self, scores: Tensor, lm_scores: Tensor) -> None:
        """Note how far retriever and language model are apart, and how sure each of them is."""
        log_retriever = torch.log_softmax(scores / self.config.retriever_temperature, dim=1)
        log_targets = self._log_targets(lm_scores)
        self.diagnostics.add(
            len(scores),
            lm_disagrees=(scores.argmax(dim=1) != log_targets.argmax(dim=1)).float().mean().item(),
            retriever_entropy=_entropy(log_retriever),
            lm_entropy=_entropy(log_targets),
        )

    def _lm_scores(self, examples: Sequence[Example], positions: Tensor, *, show: bool = False) -> Tensor:
        """Return the language model's scores of shape (examples, top_k), cached by example and passages."""
        store = self.rag_system.knowledge_store
        pairs = [
            (example, context)
            for example, row in zip(examples, positions.tolist(), strict=True)
            for context in self._contexts(store.nodes_at(row))
        ]
        totals, lengths = self._scoring().score(pairs, self.reporter if show else None)
        scores = totals / lengths if self.likelihood == "mean" else totals
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
        queries = [example.query for example in self.train_examples]
        positions = self.rag_system.search(queries, self._retriever.encode_queries(queries), self.config.top_k)[1]
        scores = self._lm_scores(self.train_examples, positions, show=True)
        self._truncation = dataclasses.replace(self._scoring().truncation)
        require_peaked_targets(self._log_targets(scores).exp(), getattr(self.config, "lm_temperature", None))
        self._restore_index(resuming)
        return range(len(self.train_examples))

    def _prepared(self) -> dict[str, float]:
        cache = self._scoring().cache
        cache.take_new()
        return cache.known()

    def _take_over(self, prepared: dict[str, float], resuming: Path | None) -> None:
        self._scorer = LikelihoodScorer(self.rag_system.require_generator())
        self._scorer.cache.put(list(prepared), list(prepared.values()))
        self._scorer.cache.take_new()
        self._restore_index(resuming)

    def _restore_index(self, checkpoint: Path | None) -> None:
        if checkpoint is not None and self.config.train == "both":
            store = self.rag_system.knowledge_store
            store.replace_embeddings(load_file(checkpoint / INDEX_FILE)["embeddings"])
            # They are those of an earlier step, whose weights are not known here.
            store.encoder_fingerprint = None

    def _query_of(self, instance: int) -> str:
        return self.train_examples[instance].query

    def _on_step(self, step: int, last: bool) -> None:
        self._exchange_likelihoods()
        if not last and step % self._refresh_every() == 0:
            self._refresh_passages()

    def _exchange_likelihoods(self) -> None:
        """Let each process know what the others have scored, and the main one keep it for a resume."""
        cache = self._scoring().cache
        for number, scored in enumerate(self.processes.all_gather(cache.take_new())):
            if number != self.processes.rank and scored:
                cache.put(list(scored), list(scored.values()))
        cache.take_new()

    def _refresh_every(self) -> int:
        per_step = self.config.batch_size * self.config.gradient_accumulation_steps
        return self.config.refresh_every or math.ceil(len(self.train_examples) / per_step)

    def _on_checkpoint(self, directory: Path) -> None:
        if self.config.train == "both":
            save_file({"embeddings": self.rag_system.knowledge_store.embeddings.contiguous()}, directory / INDEX_FILE)

    def _counts(self) -> dict[str, Any]:
        return {"scoring": self._truncation.to_dict(), "scored_pairs": len(self._scoring().cache)}


def _entropy(log_probabilities: Tensor) -> float:
    """Return the mean entropy of the rows in nats."""
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1).mean().item()


class HuggingFaceTrainerForLSR(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by LM-supervised retrieval; arguments as `HuggingFaceTrainer`.

    With `train: query` queries get a copy of the shared encoder and only that copy is tuned, so the knowledge store
    never goes stale. With `train: both` the retrieved passages are encoded anew with gradient, and the whole store is
    refreshed every `refresh_every` steps, before each validation, and at the end.
    """

    config: LSRConfig

    def _default_config(self) -> LSRConfig:
        return LSRConfig()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """As the config says."""
        return self.config.likelihood

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return lsr_loss(
            scores, lm_scores, self.config.retriever_temperature, self.config.lm_temperature, self.config.divergence
        )

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        return torch.log_softmax(lm_scores / self.config.lm_temperature, dim=1)


class HuggingFaceTrainerForPDist(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by perplexity distillation; arguments as `HuggingFaceTrainer`."""

    config: PDistConfig

    def _default_config(self) -> PDistConfig:
        return PDistConfig()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """The mean, which is minus the logarithm of the perplexity."""
        return "mean"

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return lsr_loss(scores, lm_scores, self.config.retriever_temperature, self.config.lm_temperature, "forward")

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        return torch.log_softmax(lm_scores / self.config.lm_temperature, dim=1)


class HuggingFaceTrainerForEMDR2(HuggingFaceTrainerForLMSupervision):
    """Tunes the retriever by the marginal likelihood of the answer; arguments as `HuggingFaceTrainer`."""

    config: EMDR2Config

    def _default_config(self) -> EMDR2Config:
        return EMDR2Config()

    @property
    def likelihood(self) -> Literal["mean", "sum"]:
        """As the config says."""
        return self.config.likelihood

    def _loss(self, scores: Tensor, lm_scores: Tensor) -> Tensor:
        return emdr2_loss(scores, lm_scores, self.config.retriever_temperature)

    def _log_targets(self, lm_scores: Tensor) -> Tensor:
        # The posterior of the passages under a retriever that prefers none: where it is flat, the gradient is 0.
        return torch.log_softmax(lm_scores, dim=1)


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
