"""Building the knowledge store on disk."""

from __future__ import annotations

import time
from typing import Any

from fedrag_cli.config import Config
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.moving import require_place, written_report
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.registry import build
from fedrag_cli.runs.reporting import Reporter


def build_index(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Encode the corpus and write the store to where `rag_system.knowledge_store` wants it, in the place of an old one.

    Returns:
        Where it is, how many passages it holds, how many of them were cut, its fingerprints, what its kind reports
        (such as recall@10) and the time taken.

    Raises:
        ConfigError: The config names no path, or a folder that holds anything else than a store.
    """
    settings = config.rag_system.knowledge_store
    require_place(settings)
    nodes = load_corpus(config.dataset.corpus)
    started = time.monotonic()
    retriever: SentenceTransformerRetriever = build("retriever", config.rag_system.retriever, device=config.run.device)
    store = build_knowledge_store(retriever, nodes, reporter)
    truncated = retriever.count_truncated([node.text for node in nodes], queries=False)
    return written_report(store, settings, started, truncated=truncated)
