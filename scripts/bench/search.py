"""Measure exact search of the store in memory against a bare matrix product and top-k, and write RESULTS.md.

    python scripts/bench/search.py [--passages 10000 100000 1000000] [--repeats 15]

Vectors are random, of 384 numbers and unit length. The two sides alternate, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from results import machine, write_section
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore

DIMENSION, TOP_K, TARGET = 384, 10, 1.1


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rows = [
        "| passages | queries at once | bare, ms | store, ms | ratio | target |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for passages in options.passages:
        store = filled(passages)
        for queries in (1, 64):
            bare, own = measured(store, unit_vectors(queries, seed=1), options.repeats)
            rows.append(
                f"| {passages:,} | {queries} | {1000 * bare:.2f} | {1000 * own:.2f} | {own / bare:.2f} | <= {TARGET} |"
            )
    facts = (
        f"`python scripts/bench/search.py`: the {TOP_K} best of vectors of {DIMENSION} numbers, "
        f"{torch.get_num_threads()} threads, medians of {options.repeats} alternating calls."
    )
    text = "\n".join([facts, "", *rows, "", machine()])
    print(text)
    write_section("Exact search", text)


def unit_vectors(count: int, seed: int) -> Tensor:
    """Return random vectors of unit length, of shape (count, DIMENSION)."""
    vectors = torch.randn(count, DIMENSION, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def filled(passages: int) -> InMemoryKnowledgeStore:
    """Return a store of random vectors."""
    store = InMemoryKnowledgeStore()
    store.add([KnowledgeNode(str(number), "text", {}) for number in range(passages)], unit_vectors(passages, seed=0))
    return store


def measured(store: InMemoryKnowledgeStore, queries: Tensor, repeats: int) -> tuple[float, float]:
    """Return the median seconds of the bare computation and of the store's search."""
    embeddings = store.embeddings

    def bare() -> Tensor:
        return (queries @ embeddings.T).topk(TOP_K, dim=1).indices

    def own() -> Tensor:
        return store.search_positions(queries, TOP_K)[1]

    assert torch.equal(bare(), own())
    times: dict[Callable[[], Tensor], list[float]] = {bare: [], own: []}
    for _ in range(repeats):
        for side, seconds in times.items():
            started = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[bare]), statistics.median(times[own])


if __name__ == "__main__":
    main()
