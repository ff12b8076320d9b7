"""What the tests of `fedrag index` share: kinds of stores, a reporter that remembers, and equality of stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import data_rows

from fedrag_cli.config import Config
from fedrag_cli.rag.index_convert import open_store
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.runs.reporter import SilentReporter

WriteConfig = Callable[..., Path]
Rows = list[dict[str, Any]]
STORES: dict[str, dict[str, Any]] = {
    "memory": {"type": "memory"},
    "memory mapped": {"type": "memory", "memory_map": True},
    "faiss flat": {"type": "faiss"},
    "faiss hnsw mapped": {"type": "faiss", "index": "hnsw", "memory_map": True},
    "qdrant": {"type": "qdrant"},
}
# Another composition of the batches changes the last bits of an embedding: by 1.6e-7 at most where the 174 passages of
# the quickstart were encoded by all-MiniLM-L6-v2 one by one and 64 at once. What is kept keeps the bits it had.
TOLERANCE = 1e-6
ROWS = data_rows()["corpus"]


class Notes(SilentReporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def opened(config: Config) -> KnowledgeStore:
    return open_store(config.rag_system.knowledge_store)


def assert_equal_stores(config: Config, other: Config, tolerance: float) -> None:
    found, expected = opened(config), opened(other)
    everything = torch.arange(len(expected))
    queries = torch.nn.functional.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)))
    assert found.nodes == expected.nodes
    assert found.embeddings_at(everything).sub(expected.embeddings_at(everything)).abs().max() <= tolerance
    results, wanted = (
        [[scored.node for scored in row] for row in store.search(queries, 5)] for store in (found, expected)
    )
    assert results == wanted
    assert found.encoder_fingerprint == expected.encoder_fingerprint
    assert found.corpus_fingerprint == expected.corpus_fingerprint
