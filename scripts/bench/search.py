"""Measure the store in memory against a bare matrix product and top-k, and write RESULTS.md.

    python scripts/bench/search.py [--passages 10000 100000 1000000] [--repeats 15]

Vectors are random, of 384 numbers and unit length. The two sides of a search alternate, and medians are compared.
Memory is measured in processes of their own, and so is what one more passage costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, resident, write_section
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.config import EMBEDDINGS_FILE, MemoryStoreConfig
from fedrag_cli.rag.index_convert import converted_store
from fedrag_cli.rag.knowledge_stores.base import FORMAT
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.knowledge_stores.store_files import write_embeddings, write_nodes

DIMENSION, TOP_K, TARGET = 384, 10, 1.1
MEMORY_TARGET, MAPPED_TARGET_MB, ADDED_TO, WRITTEN_AT_ONCE = 1.2, 500, 100_000, 10_000
HALVES = ("float16", "bfloat16")


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, passages, folder = options.child
        print(json.dumps(CHILDREN[task](int(passages), Path(folder))))
        return
    most = max(options.passages)
    facts = (
        f"`python scripts/bench/search.py`: the {TOP_K} best of vectors of {DIMENSION} numbers, "
        f"{torch.get_num_threads()} threads, medians of {options.repeats} alternating calls. No more than 4 million "
        "scores are held at once, and the store's search goes block by block; the bare product holds them all."
    )
    parts = [search_rows(options.passages, options.repeats), memory_rows(most), adding_rows(min(most, ADDED_TO))]
    text = "\n\n".join([facts, *("\n".join(rows) for rows in parts), machine()])
    print(text)
    write_section("Exact search", text)


def search_rows(sizes: list[int], repeats: int) -> list[str]:
    """Return the table of searches, over float32 and over rounded embeddings."""
    rows = [
        "| passages | format | recall@10 | queries at once | bare float32, ms | store, ms | ratio | target |",
        "| ---: | :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for passages in sizes:
        full = filled(passages)
        stores = {"float32": full, **{dtype: rounded(full, dtype) for dtype in HALVES}}
        for dtype, store in stores.items():
            found = store.build_report().get("recall@10", 1)
            for queries in (1, 64):
                bare, own = measured(full, store, unit_vectors(queries, seed=1), repeats)
                target = f"<= {TARGET}" if store is full else ""
                rows.append(
                    f"| {passages:,} | {dtype} | {found:.4f} | {queries} | {1000 * bare:.2f} | {1000 * own:.2f} "
                    f"| {own / bare:.2f} | {target} |"
                )
    return rows


def memory_rows(passages: int) -> list[str]:
    """Return the table of what building, loading and searching take, each in a process of its own."""
    rows = [
        "| passages | store | memory it adds, MB | of the vectors' bytes | whole process, MB | target |",
        "| ---: | :--- | ---: | ---: | ---: | :--- |",
    ]
    size = passages * DIMENSION * 4
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "store"
        write_store(passages, place)
        for task, name, target in (
            ("add", "filled by one `add`, then searched", f"<= {MEMORY_TARGET} of the vectors"),
            ("load", "loaded with its passages, then searched", ""),
            ("map", "`memory_map`, loaded and searched", f"< {MAPPED_TARGET_MB} MB in all"),
        ):
            told = in_child(task, passages, place)
            rows.append(
                f"| {passages:,} | {name} | {told['added'] / 1e6:.0f} | {told['added'] / size:.2f} "
                f"| {told['peak'] / 1e6:.0f} | {target} |"
            )
    return rows


def adding_rows(passages: int) -> list[str]:
    """Return the table of what one more passage costs a saved store."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(passages, Path(folder) / "store")
        told = in_child("append", passages, Path(folder) / "store")
    return [
        "| one more passage to | load, ms | add, ms | save, ms | open with `memory_map`, ms |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| {passages:,} | {told['load']:.0f} | {told['add']:.2f} | {told['save']:.0f} | {told['map']:.2f} |",
    ]


def unit_vectors(count: int, seed: int) -> Tensor:
    """Return random vectors of unit length, of shape (count, DIMENSION)."""
    vectors = torch.randn(count, DIMENSION, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def numbered(count: int) -> list[KnowledgeNode]:
    """Return passages of some 400 characters."""
    return [KnowledgeNode(str(number), f"passage {number} " + "of some words " * 28, {}) for number in range(count)]


def filled(passages: int) -> InMemoryKnowledgeStore:
    """Return a store of random vectors."""
    store = InMemoryKnowledgeStore()
    store.add([KnowledgeNode(str(number), "text", {}) for number in range(passages)], unit_vectors(passages, seed=0))
    return store


def rounded(store: InMemoryKnowledgeStore, dtype: Any) -> InMemoryKnowledgeStore:
    """Return the store in another number format, with its recall measured."""
    converted = converted_store(store, MemoryStoreConfig(dtype=dtype))
    assert isinstance(converted, InMemoryKnowledgeStore)
    return converted


def measured(
    full: InMemoryKnowledgeStore, store: InMemoryKnowledgeStore, queries: Tensor, repeats: int
) -> tuple[float, float]:
    """Return the median seconds of the bare computation over float32 and of a store's search."""
    embeddings = full.embeddings

    def bare() -> Tensor:
        return (queries @ embeddings.T).topk(TOP_K, dim=1).indices

    def own() -> Tensor:
        return store.search_positions(queries, TOP_K)[1]

    # Products of other shapes may round the last digit otherwise, and swap two neighbours that nearly tie.
    assert store is not full or float((bare() == own()).float().mean()) > 0.99
    own()
    times: dict[Callable[[], Tensor], list[float]] = {bare: [], own: []}
    for _ in range(repeats):
        for side, seconds in times.items():
            started = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[bare]), statistics.median(times[own])


def write_store(passages: int, folder: Path) -> None:
    """Write a store's folder without holding the store."""

    def blocks() -> Iterator[Tensor]:
        for start in range(0, passages, WRITTEN_AT_ONCE):
            yield unit_vectors(min(WRITTEN_AT_ONCE, passages - start), seed=start)

    folder.mkdir()
    shape, offsets = (passages, DIMENSION), write_nodes(numbered(passages), folder)
    write_embeddings(folder / EMBEDDINGS_FILE, blocks(), shape, torch.float32, {"format": FORMAT}, offsets)


def in_child(task: str, passages: int, folder: Path) -> dict[str, float]:
    """Run a task in a process of its own and return what it prints."""
    command = [sys.executable, __file__, "--child", task, str(passages), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def peak_of(prepare: Callable[[], Any], work: Callable[[Any], InMemoryKnowledgeStore]) -> dict[str, float]:
    """Return how much memory a store and searches in it add at their peak, and what the process takes then, in bytes.

    Args:
        prepare: Makes what the work needs and the caller keeps.
        work: Returns the store.
    """
    queries = {count: unit_vectors(count, seed=1) for count in (1, 64)}
    (queries[64] @ unit_vectors(10_000, seed=2).T).topk(TOP_K)
    needed = prepare()
    before = resident("VmRSS")
    store = work(needed)
    for some in queries.values():
        store.search(some, TOP_K)
    return {"added": resident("VmHWM") - before, "peak": resident("VmHWM")}


def added(passages: int, folder: Path) -> dict[str, float]:
    """Fill a store at once."""

    def prepare() -> tuple[list[KnowledgeNode], Tensor]:
        embeddings = torch.randn(passages, DIMENSION, generator=torch.Generator().manual_seed(0))
        return numbered(passages), embeddings

    def work(given: tuple[list[KnowledgeNode], Tensor]) -> InMemoryKnowledgeStore:
        store = InMemoryKnowledgeStore()
        store.add(*given)
        return store

    return peak_of(prepare, work)


def loaded(passages: int, folder: Path) -> dict[str, float]:
    """Load a store."""
    return peak_of(lambda: folder, InMemoryKnowledgeStore.load)


def mapped(passages: int, folder: Path) -> dict[str, float]:
    """Leave a store on disk."""
    config = MemoryStoreConfig(path=str(folder), memory_map=True)
    return peak_of(lambda: config, InMemoryKnowledgeStore.from_config)


def appended(passages: int, folder: Path) -> dict[str, float]:
    """Load a saved store, add passages to it one by one, save it, and open it where it lies."""

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        return work(), 1000 * (time.perf_counter() - started)

    store, loading = timed(lambda: InMemoryKnowledgeStore.load(folder))
    adding = []
    for number in range(15):
        node, embedding = KnowledgeNode(f"new {number}", "text " * 80, {}), unit_vectors(1, seed=number)
        adding.append(timed(lambda node=node, embedding=embedding: store.add([node], embedding))[1])
    _, saving = timed(lambda: store.save(folder))
    config = MemoryStoreConfig(path=str(folder), memory_map=True)
    opening = [timed(lambda: InMemoryKnowledgeStore.from_config(config))[1] for _ in range(15)]
    return {"load": loading, "add": statistics.median(adding), "save": saving, "map": statistics.median(opening)}


CHILDREN: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "add": added,
    "load": loaded,
    "map": mapped,
    "append": appended,
}


if __name__ == "__main__":
    main()
