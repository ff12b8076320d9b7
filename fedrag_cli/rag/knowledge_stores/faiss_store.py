"""Exact or approximate search by FAISS, over an index that can be saved and memory-mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.config import INDEX_FILE, STORE_FILE, FaissStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult, check_new, require_pairs
from fedrag_cli.rag.knowledge_stores.exact_search import measured_recall
from fedrag_cli.rag.knowledge_stores.store_files import (
    REBUILD,
    Passages,
    file_fingerprint,
    read_nodes,
    store_errors,
    write_nodes,
)
from fedrag_cli.runs.files import replace_directory_atomically

try:
    import faiss
except ImportError as import_error:
    raise ConfigError(
        "The knowledge store 'faiss' needs the package faiss-cpu, which is not installed.",
        "Install it with: pip install 'fedrag-cli[faiss]'",
    ) from import_error

NPROBE, M, EF_CONSTRUCTION, EF_SEARCH = 16, 32, 200, 128
# Fewer passages of a cluster place its centre badly; FAISS warns below it.
PASSAGES_PER_CLUSTER = 39


def new_index(vectors: Tensor, config: FaissStoreConfig) -> Any:
    """Return an index over embeddings, at least one, whose scores are inner products."""
    dimension = vectors.shape[1]
    if config.index == "ivf":
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(dimension), dimension, cluster_count(len(vectors), config), faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed, index.cp.spherical = config.seed, True
        # One centre that is the only choice needs as many passages as FAISS asks for all the same.
        index.cp.min_points_per_centroid = 1
        with _threads():
            index.train(_rows(vectors))
        index.make_direct_map()
    elif config.index == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, config.m or M, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.ef_construction or EF_CONSTRUCTION
    else:
        index = faiss.IndexFlatIP(dimension)
    add_vectors(index, vectors)
    return index


def cluster_count(passages: int, config: FaissStoreConfig) -> int:
    """Return how many clusters an ivf index gets: what is asked for, as far as the passages suffice."""
    wanted = config.nlist or round(4 * math.sqrt(passages))
    return max(1, min(wanted, passages // PASSAGES_PER_CLUSTER))


def add_vectors(index: Any, vectors: Tensor) -> None:
    """Append embeddings of shape (passages, dimension)."""
    # Several threads would link the graph of hnsw in another order each time.
    with _threads(1 if isinstance(index, faiss.IndexHNSW) else None):
        index.add(_rows(vectors))


def _rows(vectors: Tensor) -> Any:
    return vectors.detach().to("cpu", torch.float32).contiguous().numpy()


@contextmanager
def _threads(count: int | None = None) -> Iterator[None]:
    """Let FAISS use as many threads as torch does, or another number."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


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
        self.config: FaissStoreConfig
        super().__init__(config or FaissStoreConfig(), device)
        self._index: Any = None
        self._built_of = 0
        self._is_mapped = False

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

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        old = len(self)
        kept = self._passages.remove(ids)
        if len(kept) < old:
            self._build(self._vectors(old)[kept] if kept else torch.zeros(0, 0))
        return old - len(kept)

    def nearest(self, queries: Tensor, wanted: int) -> SearchResult:
        """Search the index; a query that finds too few passages is compared with all."""
        parameters = None
        if isinstance(self._index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.config.ef_search or EF_SEARCH, wanted))
        elif isinstance(self._index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=min(self.config.nprobe or NPROBE, self._index.nlist))
        with _threads():
            found = self._index.search(_rows(queries), wanted, params=parameters)
        scores, positions = map(torch.from_numpy, found)
        short = (positions < 0).any(dim=1)
        if short.any():
            scores[short], positions[short] = super().nearest(queries[short], wanted)
        return scores, positions

    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""
        if not positions.numel():
            return torch.zeros(*positions.shape, self.dimension, device=self.device)
        rows = torch.from_numpy(self._index.reconstruct_batch(positions.flatten().cpu().numpy()))
        return rows.view(*positions.shape, -1).to(self.device)

    def build_report(self) -> dict[str, Any]:
        """Return the kind of index and the recall@10 of its search, measured on a sample of the passages."""
        report: dict[str, Any] = {"index": self.config.index}
        if self.config.index == "ivf" and self._index is not None:
            report["nlist"] = int(self._index.nlist)
        if len(self) > 1:
            found = measured_recall(self.embeddings_at, self, self.search_positions, len(self), self.config.seed)
            report["recall@10"] = round(found, 4)
        return report

    def save(self, directory: Path) -> None:
        """Write index, passages and fingerprints into a new directory that replaces the old."""
        about = {**self.about(FORMAT), "built_of": self._built_of, "settings": self._build_settings()}
        with replace_directory_atomically(directory) as target:
            if self._index is not None:
                self._write_index(target / INDEX_FILE)
                about["index_file"] = file_fingerprint(target / INDEX_FILE)
            write_nodes(self._passages.nodes, target)
            (target / STORE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def _write_index(self, path: Path) -> None:
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise KnowledgeStoreError(
                f"The index cannot be written: {error}",
                "Check that the disk has space; what was saved before is intact.",
            ) from error

    @classmethod
    def _load(cls, directory: Path, config: FaissStoreConfig | None, device: torch.device | str) -> Self:
        store = cls(config, device)
        damaged = f"The knowledge store in '{directory}' is damaged"
        with store_errors(directory, " of FAISS", RuntimeError):
            about = json.loads((directory / STORE_FILE).read_text(encoding="utf-8"))
            store._passages = Passages(read_nodes(directory))
            if about["format"] != FORMAT or about["passages"] != len(store):
                raise KnowledgeStoreError(f"{damaged} or of another format.", REBUILD)
            if len(store):
                if about["index_file"] != file_fingerprint(directory / INDEX_FILE):
                    raise KnowledgeStoreError(f"{damaged}: '{INDEX_FILE}' is not as it was written.", REBUILD)
                store._is_mapped = store.config.memory_map
                flags = faiss.IO_FLAG_MMAP_IFC if store._is_mapped else 0
                store._index = faiss.read_index(str(directory / INDEX_FILE), flags)
                require_pairs(len(store), store._index.ntotal)
            built_with = dict(about["settings"])
            store.take_about(about)
            store._built_of = int(about["built_of"])
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
        return torch.from_numpy(self._index.reconstruct_n(0, count))

    def _build(self, vectors: Tensor) -> None:
        self._index = new_index(vectors, self.config) if len(vectors) else None
        self._built_of, self._is_mapped = len(vectors), False
