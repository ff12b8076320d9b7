"""FAISS indexes: building, searching, and how much of the exact result an approximate one finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.config import FaissStoreConfig
from fedrag_cli.rag.knowledge_stores.recall import found_at_once, recall, sampled_positions
from fedrag_cli.rag.knowledge_stores.ties import search_in_order

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
_CHUNK = 65536


def new_index(vectors: Tensor, config: FaissStoreConfig) -> Any:
    """Return an index over embeddings; its scores are inner products.

    Args:
        vectors: Float tensor of shape (passages, dimension), at least one.
        config: The kind of index and its settings.
    """
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
    """Return scores and positions of shape (queries, wanted); a query that finds too few is searched exactly.

    Args:
        index: What `new_index` gave.
        config: The settings of the search.
        queries: Float tensor of shape (queries, dimension).
        wanted: How many, up to the number of passages.
    """
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
        scores[short], positions[short] = exact_search(index, queries[short], wanted)
    return scores, positions


def exact_search(index: Any, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Return scores and positions of shape (queries, wanted) by comparing each query with every passage."""
    scores = torch.zeros(len(queries), 0)
    positions = torch.zeros(len(queries), 0, dtype=torch.long)
    for start in range(0, index.ntotal, _CHUNK):
        vectors = vectors_between(index, start, min(start + _CHUNK, index.ntotal))
        scores = torch.cat([scores, queries @ vectors.T], dim=1)
        here = torch.arange(start, start + len(vectors)).expand(len(queries), -1)
        positions = torch.cat([positions, here], dim=1)
        best = scores.topk(min(wanted, scores.shape[1]), dim=1)
        scores, positions = best.values, positions.gather(1, best.indices)
    return scores, positions


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


def read_index(path: Path, *, memory_map: bool) -> Any:
    """Read an index from a file, or leave its embeddings there; raises RuntimeError where the file is damaged."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)


def measured_recall(index: Any, config: FaissStoreConfig) -> float:
    """Return recall@10: which part of the 10 passages that are closest to a passage a search finds.

    It is a mean over a sample of 200 passages, each searched for among the others, from 0 to 1.
    """
    sample, wanted = sampled_positions(index.ntotal, config.seed), found_at_once(index.ntotal)
    queries = vectors_at(index, sample)

    def approximately(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return search_index(index, config, rows, count)

    def exactly(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return exact_search(index, rows, count)

    exact = search_in_order(exactly, queries, wanted, index.ntotal)[1]
    found = search_in_order(approximately, queries, wanted, index.ntotal)[1]
    return recall(sample, exact, found)


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
