"""Building the knowledge store on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fedrag_cli.config import Config
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.errors import ConfigError
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.knowledge_stores.memory import EMBEDDINGS_FILE, NODES_FILE
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.registry import build
from fedrag_cli.runs.reporting import Reporter


def build_index(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Encode the corpus and save the store at `rag_system.knowledge_store.path`, in the place of an old one.

    Returns:
        Where it is, how many passages it holds, how many of them were cut, its fingerprints and the time taken.

    Raises:
        ConfigError: The config names no path, or a folder that holds anything else than a store.
    """
    path = config.rag_system.knowledge_store.path
    if path is None:
        raise ConfigError(
            "The config does not say where to save the knowledge store.",
            "Set rag_system.knowledge_store.path, or add rag_system.knowledge_store.path=FOLDER to the command.",
        )
    _require_own_folder(Path(path))
    nodes = load_corpus(config.dataset.corpus)
    started = time.monotonic()
    retriever: SentenceTransformerRetriever = build("retriever", config.rag_system.retriever, device=config.run.device)
    store = build_knowledge_store(retriever, nodes, reporter)
    store.save(Path(path))
    return {
        "path": path,
        "passages": len(store),
        "truncated": retriever.count_truncated([node.text for node in nodes], queries=False),
        "dimension": store.dimension,
        "encoder_fingerprint": store.encoder_fingerprint,
        "corpus_fingerprint": store.corpus_fingerprint,
        "seconds": round(time.monotonic() - started, 2),
    }


def _require_own_folder(path: Path) -> None:
    """Refuse a place that holds anything but a knowledge store, because saving one replaces the whole folder."""
    if not path.exists():
        return
    if not path.is_dir() or {file.name for file in path.iterdir()} - {EMBEDDINGS_FILE, NODES_FILE}:
        raise ConfigError(
            f"'{path}' holds something else than a knowledge store, which would be lost.",
            "Set rag_system.knowledge_store.path to a new or empty folder.",
        )
