"""Exact or approximate search by FAISS, over an index that can be saved and memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import FaissStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult
from fedrag_cli.rag.knowledge_stores.checks import check_new, check_search
from fedrag_cli.rag.knowledge_stores.faiss_index import (
    add_vectors,
    measured_recall,
    new_index,
    read_index,
    search_index,
    vectors_at,
    vectors_between,
    write_index,
)
from fedrag_cli.rag.knowledge_stores.faults import REBUILD, damaged_store, no_store
from fedrag_cli.rag.knowledge_stores.folders import read_one_state
from fedrag_cli.rag.knowledge_stores.passages import (
    INDEX_FILE,
    STORE_FILE,
    Passages,
    file_fingerprint,
    read_nodes,
    write_nodes,
)
from fedrag_cli.rag.knowledge_stores.ties import search_in_order
from fedrag_cli.runs.atomic import replace_directory_atomically

FORMAT = "fedrag-faiss-store-1"
# What an index is built with; a search may choose the rest anew.
BUILD_SETTINGS = ("index", "nlist", "m", "ef_construction", "seed")


class FaissKnowledgeStore(KnowledgeStore):
    """Passages in a list and embeddings in a FAISS index, number by number in the same order.

    FAISS appends. Any other change builds the index anew, as does an append to a memory-mapped one, and one that more
    than doubles what the clusters of ivf were made of.

    Args:
        config: The kind of index and its settings.
        device: Where results are put; the search itself runs on the CPU.
    """

    def __init__(self, config: FaissStoreConfig | None = None, device: torch.device | str = "cpu") -> None:
        """Start empty."""
        super().__init__(device)
        self.config = config or FaissStoreConfig()
        self._index: Any = None
        self._built_of = 0
        self._is_mapped = False

    @classmethod
    def from_config(cls, config: FaissStoreConfig, *, device: torch.device | str = "cpu") -> FaissKnowledgeStore:
        """Load the saved store, or start an empty one where none is saved yet."""
        if config.path is not None and Path(config.path).exists():
            return cls.load(Path(config.path), config, device=device)
        return cls(config, device)

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""
        return int(self._index.d) if self._index is not None else 0

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add or replace passages; see `KnowledgeStore.add`."""
        check_new(nodes, embeddings, self.dimension)
        if not nodes:
            return
        embeddings = embeddings.detach().to("cpu", torch.float32)
        old = len(self)
        replaced, fresh = self._passages.put(nodes)
        outgrown = self.config.index == "ivf" and len(self) > 2 * self._built_of
        if self._index is not None and not (replaced or outgrown or self._is_mapped):
            add_vectors(self._index, embeddings[fresh])
            return
        vectors = torch.cat([self._vectors(old), embeddings[fresh]]) if old else embeddings[fresh]
        vectors[list(replaced.values())] = embeddings[list(replaced)]
        self._build(vectors)

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones; see `KnowledgeStore.replace_embeddings`."""
        check_new(self._passages.nodes, embeddings, self.dimension)
        self.rounded_to = None
        self._build(embeddings)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        old = len(self)
        kept = self._passages.remove(ids)
        if len(kept) < old:
            self._build(self._vectors(old)[kept])
        return old - len(kept)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.encoder_fingerprint = self.corpus_fingerprint = self.rounded_to = None
        self._passages = Passages()
        self._build(torch.zeros(0, 0))

    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query; see `KnowledgeStore.search_positions`."""
        check_search(query_embeddings, top_k, len(self), self.dimension)
        queries = query_embeddings.detach().to("cpu", torch.float32)
        scores, positions = search_in_order(
            lambda rows, wanted: search_index(self._index, self.config, rows, wanted), queries, top_k, len(self)
        )
        return scores.to(self.device), positions.to(self.device)

    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""
        if not positions.numel():
            return torch.zeros(*positions.shape, self.dimension, device=self.device)
        return vectors_at(self._index, positions.flatten()).view(*positions.shape, -1).to(self.device)

    def build_report(self) -> dict[str, Any]:
        """Return the kind of index and the recall@10 of its search, measured on a sample of the passages."""
        report: dict[str, Any] = {"index": self.config.index}
        if self.config.index == "ivf" and self._index is not None:
            report["nlist"] = int(self._index.nlist)
        if len(self) > 1:
            report["recall@10"] = round(measured_recall(self._index, self.config), 4)
        return report

    def save(self, directory: Path) -> None:
        """Write index, passages and fingerprints into a new directory that replaces the old."""
        about = {
            "format": FORMAT,
            "encoder": self.encoder_fingerprint,
            "corpus": self.corpus_fingerprint,
            "rounded": self.rounded_to,
            "passages": len(self),
            "built_of": self._built_of,
            "settings": self._build_settings(),
        }
        with replace_directory_atomically(directory) as target:
            if self._index is not None:
                write_index(self._index, target / INDEX_FILE)
                about["index_file"] = file_fingerprint(target / INDEX_FILE)
            write_nodes(self._passages.nodes, target)
            (target / STORE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, directory: Path, config: FaissStoreConfig | None = None, *, device: torch.device | str = "cpu"
    ) -> FaissKnowledgeStore:
        """Read a store that `save` wrote.

        Args:
            directory: Its folder.
            config: The settings; those that it was built with have to be the same.
            device: Where results are put.

        Raises:
            KnowledgeStoreError: The directory holds no store, a damaged one, or one that was built otherwise.
        """
        return read_one_state(directory, lambda: cls._load(directory, config, device))

    @classmethod
    def _load(cls, directory: Path, config: FaissStoreConfig | None, device: torch.device | str) -> FaissKnowledgeStore:
        store = cls(config, device)
        damaged = f"The knowledge store in '{directory}' is damaged"
        try:
            about = json.loads((directory / STORE_FILE).read_text(encoding="utf-8"))
            store._passages = Passages(read_nodes(directory))
            if about["format"] != FORMAT or about["passages"] != len(store):
                raise KnowledgeStoreError(f"{damaged} or of another format.", REBUILD)
            if len(store):
                if about["index_file"] != file_fingerprint(directory / INDEX_FILE):
                    raise KnowledgeStoreError(f"{damaged}: '{INDEX_FILE}' is not as it was written.", REBUILD)
                store._index = read_index(directory / INDEX_FILE, memory_map=store.config.memory_map)
                store._is_mapped = store.config.memory_map
            built_with = dict(about["settings"])
            store.encoder_fingerprint, store.corpus_fingerprint = about["encoder"], about["corpus"]
            store.rounded_to = about.get("rounded")
            store._built_of = int(about["built_of"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise no_store(directory, error, " of FAISS") from error
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            raise damaged_store(directory, error) from error
        if store._index is not None and store._index.ntotal != len(store):
            raise KnowledgeStoreError(f"{damaged}: passages and embeddings differ in number.", REBUILD)
        store._require_same_settings(directory, built_with)
        return store

    def _require_same_settings(self, directory: Path, built_with: dict[str, Any]) -> None:
        for name, value in self._build_settings().items():
            if built_with.get(name) != value:
                raise KnowledgeStoreError(
                    f"The knowledge store in '{directory}' was built with {name} {built_with.get(name)}, "
                    f"but the config says {value}.",
                    "Refresh it with 'fedrag index CONFIG'.",
                )

    def _build_settings(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in BUILD_SETTINGS}

    def _vectors(self, count: int) -> Tensor:
        return vectors_between(self._index, 0, count)

    def _build(self, vectors: Tensor) -> None:
        self._index = new_index(vectors, self.config) if len(vectors) else None
        self._built_of, self._is_mapped = len(vectors), False
