"""What readers and writers of a store's folder do to each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import numbered, vectors

from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import FaissStoreConfig, MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores import faiss_store, memory
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.faiss_store import FaissKnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.knowledge_stores.store_files import MappedStore

STORES: dict[str, Callable[[Path], KnowledgeStore]] = {
    "memory": lambda folder: InMemoryKnowledgeStore.load(folder),
    "mapped": lambda folder: InMemoryKnowledgeStore.load(folder, MemoryStoreConfig(memory_map=True)),
    "faiss": lambda folder: FaissKnowledgeStore.load(folder, FaissStoreConfig()),
}


def _written(folder: Path, kind: str, *, turned: bool) -> None:
    """Write a store of 20 passages, each with the embedding of its number; turned round, the passages are too."""
    store = FaissKnowledgeStore() if kind == "faiss" else InMemoryKnowledgeStore()
    rows = list(range(20))[:: -1 if turned else 1]
    store.add([numbered(20)[row] for row in rows], vectors(20, 4)[rows])
    store.corpus_fingerprint = f"turned {turned}"
    store.save(folder)


def _during(monkeypatch: pytest.MonkeyPatch, kind: str, interfere: Callable[[], None]) -> list[int]:
    """Let something happen each time when the passages of a store are about to be read."""
    calls: list[int] = []
    if kind == "mapped":
        open_mapped = MappedStore.open

        def opened(directory: Path, file: Any) -> MappedStore:
            calls.append(1)
            interfere()
            return open_mapped(directory, file)

        monkeypatch.setattr(MappedStore, "open", opened)
        return calls
    module: Any = faiss_store if kind == "faiss" else memory
    read_nodes = module.read_nodes

    def read(directory: Path) -> Any:
        calls.append(1)
        interfere()
        return read_nodes(directory)

    monkeypatch.setattr(module, "read_nodes", read)
    return calls


@pytest.mark.parametrize("kind", list(STORES))
def test_a_store_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _written(tmp_path / "store", kind, turned=False)
    replaced: list[bool] = []

    def replace_once() -> None:
        if not replaced:
            replaced.append(True)
            _written(tmp_path / "store", kind, turned=True)

    calls = _during(monkeypatch, kind, replace_once)
    store = STORES[kind](tmp_path / "store")
    assert len(calls) == 2
    assert store.corpus_fingerprint == "turned True"
    expected = vectors(20, 4)[[int(node.id[1:]) for node in store.nodes]]
    assert torch.equal(store.embeddings_at(torch.arange(20)), expected)


@pytest.mark.parametrize("kind", list(STORES))
def test_a_store_that_a_writer_has_set_aside_for_a_moment_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _written(tmp_path / "store", kind, turned=False)
    calls = _during(
        monkeypatch,
        kind,
        lambda: None if len(calls) > 1 else shutil.move(tmp_path / "store", tmp_path / ".store.old.tmp"),
    )
    assert len(STORES[kind](tmp_path / "store")) == 20
    assert len(calls) == 2


def test_a_store_that_never_stays_the_same_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _written(tmp_path / "store", "memory", turned=False)
    calls = _during(monkeypatch, "memory", lambda: _written(tmp_path / "store", "memory", turned=len(calls) % 2 == 1))
    with pytest.raises(KnowledgeStoreError, match="replaced again and again") as caught:
        InMemoryKnowledgeStore.load(tmp_path / "store")
    assert (len(calls), bool(caught.value.hint)) == (5, True)


def test_a_damaged_store_that_stays_the_same_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _written(tmp_path / "store", "memory", turned=False)
    (tmp_path / "store" / "nodes.jsonl").write_text("{}\n")
    calls = _during(monkeypatch, "memory", lambda: None)
    with pytest.raises(KnowledgeStoreError, match="damaged"):
        InMemoryKnowledgeStore.load(tmp_path / "store")
    assert len(calls) == 1
