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
from fedrag_cli.rag.knowledge_stores.base import (
    KnowledgeStore,
    SearchResult,
    check_new,
    check_search,
    require_pairs,
)
from fedrag_cli.rag.knowledge_stores.exact_search import (
    found_at_once,
    recall,
    rows_at_once,
    sampled_positions,
    search_blocks,
    search_in_order,
)
from fedrag_cli.rag.knowledge_stores.store_files import (
    REBUILD,
    Passages,
    damaged_store,
    file_fingerprint,
    no_store,
    read_nodes,
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


def search_index(index: Any, config: FaissStoreConfig, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Return scores and positions of shape (queries, wanted); a query that finds too few is searched exactly."""
    parameters = None
    if isinstance(index, faiss.IndexHNSW):
        parameters = faiss.SearchParametersHNSW(efSearch=max(config.ef_search or EF_SEARCH, wanted))
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=min(config.nprobe or NPROBE, index.nlist))
    with _threads():
        found, places = index.search(_rows(queries), wanted, params=parameters)
    scores, positions = torch.from_numpy(found), torch.from_numpy(places)
    short = (positions < 0).any(dim=1)
    if short.any():
        scores[short], positions[short] = search_blocks(IndexVectors(index), queries[short], wanted)
    return scores, positions


class IndexVectors:
    """The embeddings in an index, to compare queries with all of them."""

    def __init__(self, index: Any) -> None:
        """Wrap an index."""
        self._index = index

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all embeddings in their order, at most `rows` at once."""
        step = min(rows, rows_at_once(self._index.d))
        for start in range(0, self._index.ntotal, step):
            yield vectors_between(self._index, start, min(start + step, self._index.ntotal))


def vectors_between(index: Any, start: int, end: int) -> Tensor:
    """Return the embeddings from one position up to another, of shape (end - start, dimension)."""
    return torch.from_numpy(index.reconstruct_n(start, end - start))


def vectors_at(index: Any, positions: Tensor) -> Tensor:
    """Return the embeddings at a one-dimensional tensor of positions, of shape (len(positions), dimension)."""
    return torch.from_numpy(index.reconstruct_batch(positions.cpu().numpy()))


def write_index(index: Any, path: Path) -> None:
    """Write an index into a file; raises KnowledgeStoreError where that fails."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise KnowledgeStoreError(
            f"The index cannot be written: {error}", "Check that the disk has space; what was saved before is intact."
        ) from error


def measured_recall(index: Any, config: FaissStoreConfig) -> float:
    """Return recall@10 of an index's search on a sample of its passages; see `exact_search.recall`."""
    sample, wanted = sampled_positions(index.ntotal, config.seed), found_at_once(index.ntotal)
    queries = vectors_at(index, sample)
    exact = search_blocks(IndexVectors(index), queries, wanted)[1]
    found = search_in_order(lambda rows, count: search_index(index, config, rows, count), queries, wanted, index.ntotal)
    return recall(sample, exact, found[1])


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
    def _load(cls, directory: Path, config: FaissStoreConfig | None, device: torch.device | str) -> Self:
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
                store._is_mapped = store.config.memory_map
                flags = faiss.IO_FLAG_MMAP_IFC if store._is_mapped else 0
                store._index = faiss.read_index(str(directory / INDEX_FILE), flags)
                require_pairs(len(store), store._index.ntotal)
            built_with = dict(about["settings"])
            store.encoder_fingerprint, store.corpus_fingerprint = about["encoder"], about["corpus"]
            store.rounded_to = about.get("rounded")
            store._built_of = int(about["built_of"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise no_store(directory, error, " of FAISS") from error
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            raise damaged_store(directory, error) from error
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
