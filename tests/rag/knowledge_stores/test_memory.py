"""Exact search block by block, and how much memory the store in memory takes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stores import MEASURE, needs_proc, nodes, numbered, vectors

from fedrag_cli.rag.knowledge_stores import exact_search as blocks
from fedrag_cli.rag.knowledge_stores.exact_search import LEAST_ROOM, HeldVectors, top_in_order
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore

DIMENSION = 384
PASSAGES = 200_000


@pytest.mark.parametrize("scores_at_once", [1, 7, 64, 1000, 2**22])
@pytest.mark.parametrize("top_k", [1, 5, 60, 300])
def test_blocks_give_what_one_product_gives(monkeypatch: pytest.MonkeyPatch, scores_at_once: int, top_k: int) -> None:
    monkeypatch.setattr(blocks, "SCORES_AT_ONCE", scores_at_once)
    monkeypatch.setattr(blocks, "LEAST_ROWS", 3)
    # Whole numbers of one digit make exact scores, of which many tie within and across blocks.
    stored = torch.randint(-1, 2, (300, 3), generator=torch.Generator().manual_seed(1)).float()
    queries = torch.randint(-1, 2, (19, 3), generator=torch.Generator().manual_seed(2)).float()
    store = InMemoryKnowledgeStore()
    store.add(numbered(300), stored)
    scores, positions = store.search_positions(queries, top_k)
    exact = queries @ stored.T
    expected = exact.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(positions, expected)
    assert torch.equal(scores, exact.gather(1, expected))


def test_no_more_scores_than_allowed_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watching(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(scores.numel())
        return top_in_order(scores, top_k)

    monkeypatch.setattr(blocks, "top_in_order", watching)
    monkeypatch.setattr(blocks, "SCORES_AT_ONCE", 50_000)
    store = InMemoryKnowledgeStore()
    store.add(numbered(9000), vectors(9000, 4))
    for queries in (1, 64, 5000):
        store.search_positions(vectors(queries, 4, seed=1), 10)
    assert max(seen) <= 50_000
    assert sum(seen) == 9000 * (1 + 64 + 5000)


def test_search_is_exact_under_autocast_too() -> None:
    store, queries = InMemoryKnowledgeStore(), vectors(5, 32, seed=1)
    store.add(numbered(500), vectors(500, 32))
    expected = store.search_positions(queries, 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = store.search_positions(queries, 500)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_large_finite_queries_are_no_error() -> None:
    store = InMemoryKnowledgeStore()
    store.add(nodes("a", "b"), torch.tensor([[0.1, 0.0], [0.0, 0.2]]))
    assert store.search(torch.full((1, 2), 3e38), 1)[0][0].node.id == "b"


def test_the_buffer_grows_by_an_eighth() -> None:
    held, sizes = HeldVectors(), set()
    held.extend(torch.zeros(100_000, 1))
    sizes.add(len(held._buffer))
    for _ in range(200):
        held.extend(torch.zeros(1000, 1))
        sizes.add(len(held._buffer))
    ordered = sorted(sizes)
    assert ordered[0] == 112_500
    assert all(1.1 < after / before < 1.15 for before, after in itertools.pairwise(ordered))
    small = HeldVectors()
    small.extend(torch.zeros(3, 1))
    assert len(small._buffer) == 3 + LEAST_ROOM


@pytest.mark.parametrize("gone", [[0], [499], [3, 4, 5, 250], list(range(0, 500, 2)), list(range(499))])
def test_embeddings_close_up_in_blocks_when_some_go(monkeypatch: pytest.MonkeyPatch, gone: list[int]) -> None:
    monkeypatch.setattr("fedrag_cli.rag.knowledge_stores.exact_search.NUMBERS_AT_ONCE", 14)
    store, stored = InMemoryKnowledgeStore(), vectors(500, 2)
    store.add(numbered(500), stored)
    store.delete([f"p{number}" for number in gone])
    kept = [number for number in range(500) if number not in gone]
    assert torch.equal(store.embeddings, stored[kept])
    assert [node.id for node in store.nodes] == [f"p{number}" for number in kept]


def test_numbers_that_only_float64_can_hold_are_not_finite() -> None:
    from fedrag_cli.errors import KnowledgeStoreError

    store = InMemoryKnowledgeStore()
    with pytest.raises(KnowledgeStoreError, match="'b' has a number that is too large for float32"):
        store.add(nodes("a", "b"), torch.tensor([[1.0], [1e300]], dtype=torch.float64))
    assert len(store) == 0


def measured(tmp_path: Path, code: str, passages: int = PASSAGES) -> float:
    """Return by how many times the vectors' bytes the memory of a process peaks over what it had, less an allowance.

    The allowance of 64 MB is for the passages' numbers, blocks of scores, and what torch keeps for itself.
    """
    command = [sys.executable, "-c", MEASURE + code, str(passages), str(DIMENSION), str(tmp_path / "store")]
    before, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return (peak - before - 64 * 2**20) / (4 * passages * DIMENSION)


ADD = """
nodes, embeddings, store = passages(), torch.randn(PASSAGES, DIMENSION), InMemoryKnowledgeStore()
before = memory("VmRSS")
store.add(nodes, embeddings)
store.search_positions(queries(), 10)
print(before, memory("VmHWM"))
"""
SAVE = """
store = InMemoryKnowledgeStore()
store.add(passages(), torch.randn(PASSAGES, DIMENSION))
store.save(FOLDER)
"""
LOAD = """
before = memory("VmRSS")
store = InMemoryKnowledgeStore.load(FOLDER)
store.search_positions(queries(), 10)
print(before, memory("VmHWM"))
"""


@pytest.mark.slow
@needs_proc
def test_a_store_takes_little_more_memory_than_its_vectors(tmp_path: Path) -> None:
    assert 0.7 < measured(tmp_path, ADD) < 1.2


@pytest.mark.slow
@needs_proc
def test_loading_a_store_takes_little_more_memory_than_its_vectors(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE + SAVE, str(PASSAGES), str(DIMENSION), str(tmp_path / "store")]
    subprocess.run(command, check=True)
    # The passages themselves, read from their file, are counted too.
    assert 0.7 < measured(tmp_path, LOAD) < 1.3
