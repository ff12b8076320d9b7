"""Building a RAG system from a config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fedrag_cli.config import Config
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.registry import build

Progress = Callable[[int], None]


def build_rag_system(
    config: Config,
    *,
    nodes: Sequence[KnowledgeNode] | None = None,
    with_generator: bool = True,
    store_directory: Path | None = None,
    progress: Progress | None = None,
) -> RAGSystem:
    """Load the models and the passages that a config describes, and fill or open the knowledge store.

    Args:
        config: A loaded config.
        nodes: The passages, where they are loaded already.
        with_generator: Whether to load the generator.
        store_directory: A saved store to use in place of the config's.
        progress: Called with the number of passages encoded after each batch, where the store is filled.

    Raises:
        ModelError: A model is missing or broken.
        DataError: The corpus is missing, empty or bad.
        KnowledgeStoreError: A saved store does not fit the encoder or the corpus, or top_k exceeds it.
    """
    nodes = nodes if nodes is not None else load_corpus(config.dataset.corpus)
    _check_top_k(config, len(nodes))
    device = config.run.device
    retriever: SentenceTransformerRetriever = build("retriever", config.rag_system.retriever, device=device)
    store = _open_store(config, retriever, nodes, store_directory, progress)
    generator = None
    if with_generator and config.rag_system.generator is not None:
        generator = build("generator", config.rag_system.generator, prompt=config.rag_system.prompt, device=device)
    return RAGSystem(retriever, store, generator, config.rag_system.top_k, config)


def build_knowledge_store(
    config: Config,
    retriever: SentenceTransformerRetriever,
    nodes: Sequence[KnowledgeNode],
    progress: Progress | None = None,
) -> InMemoryKnowledgeStore:
    """Encode passages into a new store that carries the fingerprints of encoder and corpus."""
    store = InMemoryKnowledgeStore(retriever.device)
    store.add(nodes, retriever.encode_passages([node.text for node in nodes], progress))
    store.encoder_fingerprint = retriever.fingerprint()
    store.corpus_fingerprint = corpus_fingerprint(nodes)
    return store


def corpus_fingerprint(nodes: Sequence[KnowledgeNode]) -> str:
    """Return a hash over ids and texts of passages, in their order, of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for node in nodes:
        digest.update(json.dumps([node.id, node.text], ensure_ascii=False).encode())
    return digest.hexdigest()


def _open_store(
    config: Config,
    retriever: SentenceTransformerRetriever,
    nodes: Sequence[KnowledgeNode],
    store_directory: Path | None,
    progress: Progress | None,
) -> InMemoryKnowledgeStore:
    path = store_directory or (Path(config.rag_system.knowledge_store.path) if config.rag_system.knowledge_store.path else None)
    if path is None or not path.exists():
        return build_knowledge_store(config, retriever, nodes, progress)
    store = InMemoryKnowledgeStore.load(path, device=retriever.device)
    store.require_encoder(retriever.fingerprint())
    if store.corpus_fingerprint != corpus_fingerprint(nodes):
        raise KnowledgeStoreError(
            f"The knowledge store in '{path}' was built from other passages than the corpus has now.",
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
