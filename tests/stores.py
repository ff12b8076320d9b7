"""Passages and embeddings of knowledge stores; used by the tests of the stores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.config import QdrantStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore


def nodes(*ids: str) -> list[KnowledgeNode]:
    return [KnowledgeNode(id, f"text of {id}", {"title": id.upper()}) for id in ids]


def numbered(count: int, start: int = 0) -> list[KnowledgeNode]:
    return nodes(*(f"p{number}" for number in range(start, start + count)))


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SERVER = "http://h:1"


def publish(source: KnowledgeStore, config: QdrantStoreConfig, server: Any) -> KnowledgeStore:
    """Publish a store to a Qdrant in memory, which stands for any server."""
    from fedrag_cli.rag.knowledge_stores import qdrant_store

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(qdrant_store, "connect", lambda _: server)
        config = dataclasses.replace(config, url=SERVER)
        return qdrant_store.QdrantKnowledgeStore().publish(source, config)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


MEASURE = """
import sys
from pathlib import Path

import torch

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.config import QdrantStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.config import MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore

PASSAGES, DIMENSION, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])


def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024


def passages():
    return [KnowledgeNode(f"p{number}", "text", {}) for number in range(PASSAGES)]


def queries(count=64):
    return torch.randn(count, DIMENSION)


"""
