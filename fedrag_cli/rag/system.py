"""The RAG system: retrieve passages, write the prompt, generate the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedrag_cli.config import Config, PromptConfig
from fedrag_cli.errors import ConfigError
from fedrag_cli.losses import passage_log_weights
from fedrag_cli.rag.generators.base import Generator, TrainableGenerator
from fedrag_cli.rag.hybrid import HybridSearch
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, ScoredNode, SearchResult
from fedrag_cli.rag.retrievers.base import Progress, Retriever, TrainableRetriever

OnAnswers = Callable[[list[int], "list[RAGAnswer]"], None]
ENSEMBLE_TEMPERATURE = 0.05


@dataclass(frozen=True)
class RAGAnswer:
    """An answer and what it was drawn from.

    Args:
        query: The question.
        text: The answer.
        sources: The passages of the prompt, best first.
        dropped_tokens: Tokens of context that did not fit into the prompt.
        is_bare: Whether nothing of the context fitted, so that the answer was given without any.
        prompt_tokens: Tokens of its prompts, those that did not fit included.
    """

    query: str
    text: str
    sources: list[ScoredNode]
    dropped_tokens: int = 0
    is_bare: bool = False
    prompt_tokens: int = 0


@dataclass
class RAGSystem:
    """Retriever, knowledge store and generator as one.

    Args:
        retriever: Encodes queries and passages.
        knowledge_store: Holds the passages; every search asks whether the retriever's encoder filled it.
        generator: Writes the answers; None where only retrieval is wanted.
        top_k: Passages of a prompt.
        config: The config that it was built from, if it was; trainers take their settings and data from it.
        inference: concat puts all passages into one prompt, ensemble weighs an answer from each (REPLUG, RA-DIT).
        ensemble_temperature: Temperature of the softmax that makes weights of the passages' scores, above 0.
        hybrid: Fuses the retriever's ranking with that of BM25; None where only embeddings are searched.
    """

    retriever: Retriever
    knowledge_store: KnowledgeStore
    generator: Generator | None = None
    top_k: int = 3
    config: Config | None = None
    inference: Literal["concat", "ensemble"] = "concat"
    ensemble_temperature: float = ENSEMBLE_TEMPERATURE
    hybrid: HybridSearch | None = None

    def __post_init__(self) -> None:
        """Look which fields the passages have; raises DataError where the passage template names one that none has."""
        if self.generator is not None:
            size = len(self.knowledge_store)
            chunks = (range(start, min(start + 1000, size)) for start in range(0, size, 1000))
            self.generator.require_fields(node for chunk in chunks for node in self.knowledge_store.nodes_at(chunk))

    @property
    def prompt_config(self) -> PromptConfig:
        """How prompts are written."""
        return self.config.rag_system.prompt if self.config is not None else PromptConfig()

    def require_generator(self) -> Generator:
        """Return the generator; raises ConfigError where there is none."""
        if self.generator is None:
            raise ConfigError("The RAG system has no generator.", "Add rag_system.generator to the config.")
        return self.generator

    def require_trainable_generator(self) -> TrainableGenerator:
        """Return the generator; raises ConfigError where there is none, or none with weights."""
        generator = self.require_generator()
        if not isinstance(generator, TrainableGenerator):
            raise ConfigError(
                f"The generator {type(generator).__name__} has no weights that could be tuned.",
                "Set trainer.mode: retriever, or use a generator with weights.",
            )
        return generator

    def require_trainable_retriever(self) -> TrainableRetriever:
        """Return the retriever; raises ConfigError where it has no weights."""
        if not isinstance(self.retriever, TrainableRetriever):
            raise ConfigError(
                f"The retriever {type(self.retriever).__name__} has no weights that could be tuned.",
                "Set trainer.mode: generator, or use a retriever with weights.",
            )
        return self.retriever

    def require_trainable(self, side: str) -> TrainableRetriever | TrainableGenerator:
        """Return the retriever or the generator, as `side` says; raises ConfigError where it has no weights."""
        return self.require_trainable_retriever() if side == "retriever" else self.require_trainable_generator()

    def retrieve(self, query: str, top_k: int | None = None) -> list[ScoredNode]:
        """Return the best passages for one query; see `batch_retrieve`."""
        return self.batch_retrieve([query], top_k)[0]

    def batch_retrieve(
        self, queries: Sequence[str], top_k: int | None = None, progress: Progress | None = None
    ) -> list[list[ScoredNode]]:
        """Return the best passages for each query, best first.

        Args:
            queries: The questions.
            top_k: How many passages; the system's own by default.
            progress: Called with the number of queries encoded after each batch.

        Raises:
            KnowledgeStoreError: The store is empty, smaller than top_k, or was filled by another encoder.
        """
        if not queries:
            return []
        self.require_matching_store()
        embeddings = self.retriever.encode_queries(queries, progress)
        found = self.search(queries, embeddings, self.top_k if top_k is None else top_k)
        return self.knowledge_store.scored_nodes(*found)

    def search(self, queries: Sequence[str], embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query, by its embedding and, where there is a lexical side, by its words.

        Args:
            queries: The questions.
            embeddings: Their embeddings, of shape (queries, dimension).
            top_k: How many, from 1 to the number of passages.

        Returns:
            Scores and positions in the knowledge store, both of shape (queries, top_k), best first.

        Raises:
            KnowledgeStoreError: As `KnowledgeStore.search_positions`.
        """
        if self.hybrid is None:
            return self.knowledge_store.search_positions(embeddings, top_k)
        return self.hybrid.search(self.knowledge_store, queries, embeddings, top_k)

    def require_matching_store(self) -> None:
        """Raise KnowledgeStoreError where the knowledge store was filled by another passage encoder."""
        self.knowledge_store.require_encoder(self.retriever.fingerprint())

    def query(self, query: str, top_k: int | None = None) -> RAGAnswer:
        """Answer one question; see `batch_query`."""
        return self.batch_query([query], top_k)[0]

    def batch_query(
        self, queries: Sequence[str], top_k: int | None = None, progress: Progress | None = None
    ) -> list[RAGAnswer]:
        """Answer questions from their passages, the way `inference` says.

        Args:
            queries: The questions.
            top_k: Passages of a prompt; the system's own by default.
            progress: Called with the number of questions answered after each batch.

        Raises:
            DataError: A question is longer than the context window.
            KnowledgeStoreError: See `batch_retrieve`.
        """
        return self.answer(queries, self.batch_retrieve(queries, top_k), progress)

    def answer(
        self,
        queries: Sequence[str],
        sources: Sequence[list[ScoredNode]],
        progress: Progress | None = None,
        on_answers: OnAnswers | None = None,
    ) -> list[RAGAnswer]:
        """Answer questions from passages that were retrieved already; see `batch_query`.

        Args:
            queries: The questions.
            sources: Their passages, best first; a question without any is asked without context.
            progress: Called with the number of questions answered after each batch.
            on_answers: Called after each batch with positions in `queries` and their answers.
        """
        generator = self.require_generator()
        prompts = [
            [generator.encode_prompt(query, [scored.node for scored in context]) for context in self.contexts(found)]
            for query, found in zip(queries, sources, strict=True)
        ]
        answers: dict[int, RAGAnswer] = {}

        def keep(positions: list[int], texts: list[str]) -> None:
            batch = []
            for position, text in zip(positions, texts, strict=True):
                group = prompts[position]
                batch.append(
                    RAGAnswer(
                        queries[position],
                        text,
                        list(sources[position]),
                        dropped_tokens=sum(prompt.dropped_tokens for prompt in group),
                        is_bare=all(prompt.is_bare for prompt in group),
                        prompt_tokens=sum(prompt.tokens for prompt in group),
                    )
                )
            answers.update(zip(positions, batch, strict=True))
            if on_answers is not None:
                on_answers(positions, batch)
            if progress is not None:
                progress(len(positions))

        if self.inference == "ensemble":
            generator.answer_ensemble(prompts, [self.passage_log_weights(found) for found in sources], keep)
        else:
            generator.answer([group[0] for group in prompts], keep)
        return [answers[position] for position in range(len(queries))]

    def contexts(self, found: Sequence[ScoredNode]) -> list[list[ScoredNode]]:
        """Return what goes into each prompt of a question: all its passages, or with `ensemble` one each."""
        if self.inference == "ensemble" and found:
            return [[scored] for scored in found]
        return [list(found)]

    def passage_log_weights(self, found: Sequence[ScoredNode]) -> Tensor:
        """Return the log-weight of each of a question's prompts, of shape (prompts,).

        With `ensemble` they are log softmax(score / ensemble_temperature); a single prompt has the weight 1.
        """
        scores = [context[0].score if context else 0.0 for context in self.contexts(found)]
        return passage_log_weights(torch.tensor(scores), self.ensemble_temperature)

    def generate(self, prompt: str) -> str:
        """Continue one prompt, without retrieval."""
        return self.require_generator().generate(prompt)

    def batch_generate(self, prompts: Sequence[str]) -> list[str]:
        """Continue prompts of any lengths, without retrieval."""
        return self.require_generator().batch_generate(prompts)


def refresh_store(rag_system: RAGSystem, progress: Progress | None = None) -> None:
    """Re-encode every passage with the retriever's passage encoder as it is now."""
    store, retriever = rag_system.knowledge_store, rag_system.retriever
    if len(store):
        store.replace_embeddings(retriever.encode_passages([node.text for node in store.nodes], progress))
    store.encoder_fingerprint = retriever.fingerprint()


def refresh_stale_store(rag_system: RAGSystem) -> None:
    """Re-encode the passages where the passage encoder has changed since the store was filled."""
    if rag_system.knowledge_store.encoder_fingerprint != rag_system.retriever.fingerprint():
        refresh_store(rag_system)
