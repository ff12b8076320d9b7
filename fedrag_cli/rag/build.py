"""Building a RAG system from a config, or from what a run has tuned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedrag_cli.config import Config
from fedrag_cli.config.validation import tuned_sides
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.generators.base import Generator
from fedrag_cli.rag.hybrid import HybridSearch, lexical_folder
from fedrag_cli.rag.index_convert import converted_store, open_store
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.models import choose_device
from fedrag_cli.rag.retrievers.base import Retriever
from fedrag_cli.rag.system import ENSEMBLE_TEMPERATURE, RAGSystem
from fedrag_cli.registry import build
from fedrag_cli.runs.files import restore_interrupted
from fedrag_cli.runs.reporter import Reporter, SilentReporter


def build_rag_system(
    config: Config,
    *,
    nodes: Sequence[KnowledgeNode] | None = None,
    fingerprint: str | None = None,
    with_generator: bool = True,
    reporter: Reporter | None = None,
) -> RAGSystem:
    """Load the models and the passages that a config describes, and fill or open the knowledge store.

    Args:
        config: A loaded config.
        nodes: The passages, where they are loaded already.
        fingerprint: Their `corpus_fingerprint`, where it is known already.
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
    # What is wrong with a store or the words beside it is told before the models are loaded, which takes longer.
    fingerprint = fingerprint or corpus_fingerprint(nodes)
    store = _open_store(config, fingerprint, reporter)
    hybrid = _open_hybrid_search(config, nodes, store, reporter) if store is not None else None
    reporter.note("Loading the models")
    retriever = load_retriever(config, reporter)
    if store is not None:
        store.require_encoder(retriever.fingerprint())
    generator = _load_generator(config, reporter, with_generator)
    if store is None:
        built = build_knowledge_store(retriever, nodes, reporter, fingerprint)
        store = converted_store(built, config.rag_system.knowledge_store, retriever.device)
        hybrid = build_hybrid_search(config, store.nodes, reporter)
    return _assemble(config, retriever, store, generator, hybrid)


def build_rag_system_without_passages(
    config: Config, *, with_generator: bool = True, reporter: Reporter | None = None
) -> RAGSystem:
    """Load the models alone, for the server of a federation, which has no data; raises ModelError."""
    reporter = reporter or SilentReporter()
    reporter.note("Loading the models")
    retriever = load_retriever(config, reporter)
    generator = _load_generator(config, reporter, with_generator)
    store = InMemoryKnowledgeStore(device=retriever.device)
    store.encoder_fingerprint = retriever.fingerprint()
    return _assemble(config, retriever, store, generator)


def build_knowledge_store(
    retriever: Retriever, nodes: Sequence[KnowledgeNode], reporter: Reporter, fingerprint: str | None = None
) -> InMemoryKnowledgeStore:
    """Encode passages into a new store that carries the fingerprints of encoder and corpus."""
    store = InMemoryKnowledgeStore(device=retriever.device)
    with reporter.task("Encoding passages", len(nodes), "passage") as advance:
        store.add(nodes, retriever.encode_passages([node.text for node in nodes], advance))
    store.encoder_fingerprint = retriever.fingerprint()
    store.corpus_fingerprint = fingerprint or corpus_fingerprint(nodes)
    return store


def corpus_fingerprint(nodes: Sequence[KnowledgeNode]) -> str:
    """Return a hash over ids, texts and metadata of passages, in their order, of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for node in nodes:
        digest.update(json.dumps([node.id, node.text, node.metadata], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _assemble(
    config: Config,
    retriever: Retriever,
    store: KnowledgeStore,
    generator: Generator | None,
    hybrid: HybridSearch | None = None,
) -> RAGSystem:
    settings = config.rag_system
    temperature = settings.ensemble_temperature or ENSEMBLE_TEMPERATURE
    return RAGSystem(retriever, store, generator, settings.top_k, config, settings.inference, temperature, hybrid)


def _open_hybrid_search(
    config: Config, nodes: Sequence[KnowledgeNode], store: KnowledgeStore, reporter: Reporter
) -> HybridSearch | None:
    place = config.rag_system.knowledge_store
    # A filter hides passages of the store, whose positions then are others than in the index beside it.
    folder = lexical_folder(place.folder) if place == place.unfiltered() else None
    return build_hybrid_search(config, nodes if len(nodes) == len(store) else store.nodes, reporter, folder)


def build_hybrid_search(
    config: Config, nodes: Sequence[KnowledgeNode], reporter: Reporter, folder: Path | None = None
) -> HybridSearch | None:
    """Return the lexical side that a config names over passages, opened where its folder is; None without one."""
    settings = config.rag_system
    if settings.lexical is None:
        return None
    if folder is not None:
        restore_interrupted(folder)
    if folder is None or not folder.exists():
        reporter.note("Counting the words of the passages")
    return HybridSearch(build("lexical", settings.lexical, nodes, folder), settings.fusion)


def load_retriever(config: Config, reporter: Reporter) -> Retriever:
    """Load the retriever that a config describes, and tell what there is to know about it."""
    retriever: Retriever = build("retriever", config.rag_system.retriever, device=config.run.device)
    for note in retriever.notes:
        reporter.note(note)
    return retriever


def _load_generator(config: Config, reporter: Reporter, wanted: bool) -> Generator | None:
    settings = config.rag_system
    if settings.generator is None or not wanted:
        return None
    generator: Generator = build(
        "generator", settings.generator, prompt=settings.prompt, device=config.run.device, seed=config.run.seed
    )
    for note in generator.notes:
        reporter.note(note)
    return generator


def _open_store(config: Config, fingerprint: str, reporter: Reporter) -> KnowledgeStore | None:
    """Return the built store that a config names; None where there is none, so that the passages are to be encoded."""
    settings = config.rag_system.knowledge_store
    store, place = open_store(settings, choose_device(config.run.device)), settings.place
    # A filter may hide all passages of a store.
    if not len(store) and store.encoder_fingerprint is None:
        if place is not None:
            reporter.note(
                f"There is no knowledge store at {place} yet, so all passages are encoded, and only for this command. "
                "'fedrag index CONFIG' keeps them there."
            )
        return None
    if store.corpus_fingerprint != fingerprint:
        raise KnowledgeStoreError(
            f"The knowledge store in '{place}' was built from other passages than the corpus has now.",
            "Refresh it with 'fedrag index CONFIG'.",
        )
    return store


def _check_top_k(config: Config, passages: int) -> None:
    wanted = {"rag_system.top_k": config.rag_system.top_k}
    for side in tuned_sides(config):
        wanted[f"trainer.{side}.top_k"] = getattr(getattr(config.trainer, side), "top_k", None) or 0
    for key, top_k in wanted.items():
        if top_k > passages:
            raise KnowledgeStoreError(
                f"{key} is {top_k}, but the corpus has {passages} passages.", f"Set it to {passages} or less."
            )
