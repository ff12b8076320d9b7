"""Building a RAG system from a config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from fedrag_cli.config import Config
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.moving import converted_store, place_of
from fedrag_cli.rag.opening import open_store
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import ENSEMBLE_TEMPERATURE, RAGSystem
from fedrag_cli.registry import build
from fedrag_cli.runs.reporting import Reporter, SilentReporter


def build_rag_system(
    config: Config,
    *,
    nodes: Sequence[KnowledgeNode] | None = None,
    with_generator: bool = True,
    reporter: Reporter | None = None,
) -> RAGSystem:
    """Load the models and the passages that a config describes, and fill or open the knowledge store.

    Args:
        config: A loaded config.
        nodes: The passages, where they are loaded already.
        with_generator: Whether to load the generator.
        reporter: Told what is being loaded, and shown how the store is filled.

    Raises:
        ModelError: A model is missing or broken.
        DataError: The corpus is missing, empty or bad.
        KnowledgeStoreError: A saved store does not fit the encoder or the corpus, or top_k exceeds it.
    """
    nodes = nodes if nodes is not None else load_corpus(config.dataset.corpus)
    _check_top_k(config, len(nodes))
    reporter = reporter or SilentReporter()
    retriever, generator = _load_models(config, reporter, with_generator=with_generator)
    store = _open_store(config, retriever, nodes, reporter)
    return _assemble(config, retriever, store, generator)


def build_rag_system_without_passages(
    config: Config, *, with_generator: bool = True, reporter: Reporter | None = None
) -> RAGSystem:
    """Load the models alone, for the server of a federation, which has no data.

    Args:
        config: A loaded config.
        with_generator: Whether to load the generator.
        reporter: Told what is being loaded.

    Raises:
        ModelError: A model is missing or broken.
    """
    retriever, generator = _load_models(config, reporter or SilentReporter(), with_generator=with_generator)
    store = InMemoryKnowledgeStore(retriever.device)
    store.encoder_fingerprint = retriever.fingerprint()
    return _assemble(config, retriever, store, generator)


def build_knowledge_store(
    retriever: SentenceTransformerRetriever, nodes: Sequence[KnowledgeNode], reporter: Reporter
) -> InMemoryKnowledgeStore:
    """Encode passages into a new store that carries the fingerprints of encoder and corpus."""
    store = InMemoryKnowledgeStore(retriever.device)
    with reporter.task("Encoding passages", len(nodes), "passage") as advance:
        store.add(nodes, retriever.encode_passages([node.text for node in nodes], advance))
    store.encoder_fingerprint = retriever.fingerprint()
    store.corpus_fingerprint = corpus_fingerprint(nodes)
    return store


def corpus_fingerprint(nodes: Sequence[KnowledgeNode]) -> str:
    """Return a hash over ids, texts and metadata of passages, in their order, of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for node in nodes:
        digest.update(json.dumps([node.id, node.text, node.metadata], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _assemble(
    config: Config,
    retriever: SentenceTransformerRetriever,
    store: KnowledgeStore,
    generator: CausalLMGenerator | None,
) -> RAGSystem:
    settings = config.rag_system
    temperature = settings.ensemble_temperature or ENSEMBLE_TEMPERATURE
    return RAGSystem(retriever, store, generator, settings.top_k, config, settings.inference, temperature)


def _load_models(
    config: Config, reporter: Reporter, *, with_generator: bool
) -> tuple[SentenceTransformerRetriever, CausalLMGenerator | None]:
    device = config.run.device
    reporter.note("Loading the models")
    retriever: SentenceTransformerRetriever = build("retriever", config.rag_system.retriever, device=device)
    for note in retriever.notes:
        reporter.note(note)
    if not with_generator or config.rag_system.generator is None:
        return retriever, None
    prompt, seed = config.rag_system.prompt, config.run.seed
    generator: CausalLMGenerator = build(
        "generator", config.rag_system.generator, prompt=prompt, device=device, seed=seed
    )
    for note in generator.notes:
        reporter.note(note)
    return retriever, generator


def _open_store(
    config: Config, retriever: SentenceTransformerRetriever, nodes: Sequence[KnowledgeNode], reporter: Reporter
) -> KnowledgeStore:
    store = open_store(config.rag_system.knowledge_store, retriever.device)
    if not len(store):
        built = build_knowledge_store(retriever, nodes, reporter)
        return converted_store(built, config.rag_system.knowledge_store, retriever.device)
    store.require_encoder(retriever.fingerprint())
    if store.corpus_fingerprint != corpus_fingerprint(nodes):
        place = place_of(config.rag_system.knowledge_store)
        raise KnowledgeStoreError(
            f"The knowledge store in '{place}' was built from other passages than the corpus has now.",
            "Refresh it with 'fedrag index CONFIG'.",
        )
    return store


def _check_top_k(config: Config, passages: int) -> None:
    wanted = {"rag_system.top_k": config.rag_system.top_k}
    for side in ("retriever", "generator"):
        top_k = getattr(getattr(config.trainer, side), "top_k", None)
        if top_k is not None and config.trainer.mode in (side, "alternating"):
            wanted[f"trainer.{side}.top_k"] = top_k
    for key, top_k in wanted.items():
        if top_k > passages:
            raise KnowledgeStoreError(
                f"{key} is {top_k}, but the corpus has {passages} passages.", f"Set it to {passages} or less."
            )
