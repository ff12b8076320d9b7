"""The store in memory that leaves what is saved on disk, and the one that keeps half the digits."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from indexing import ROWS
from safetensors import safe_open
from safetensors.torch import save_file
from stores import MEASURE, needs_proc, nodes, numbered, vectors

from fedrag_cli.config import Config, load_config
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.config import EMBEDDINGS_FILE, NODES_FILE, FaissStoreConfig, MemoryStoreConfig
from fedrag_cli.rag.index_build import build_index
from fedrag_cli.rag.index_convert import converted_store, move_index
from fedrag_cli.rag.knowledge_stores.faiss_store import FaissKnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.runs.reporter import SilentReporter

WriteConfig = Callable[..., Path]
HALVES = ["float16", "bfloat16"]


def store_of(count: int = 200, dimension: int = 16, **settings: Any) -> InMemoryKnowledgeStore:
    store = InMemoryKnowledgeStore(config=MemoryStoreConfig(**settings))
    store.add(numbered(count), torch.nn.functional.normalize(vectors(count, dimension)))
    return store


def mapped(folder: Path, **settings: Any) -> InMemoryKnowledgeStore:
    return InMemoryKnowledgeStore.from_config(MemoryStoreConfig(path=str(folder), memory_map=True, **settings))


# On disk


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_mapped_store_finds_the_same_and_holds_nothing(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, queries = store_of(dtype=dtype), vectors(7, 16, seed=3)
    store.save(tmp_path / "store")
    monkeypatch.setattr("fedrag_cli.rag.knowledge_stores.exact_search.NUMBERS_AT_ONCE", 160)
    monkeypatch.setattr("fedrag_cli.rag.knowledge_stores.store_files._BYTES_AT_ONCE", 100)
    again = mapped(tmp_path / "store", dtype=dtype)
    # Products of other sizes round otherwise in the last digit.
    for mine, expected in zip(again.search(queries, 9), store.search(queries, 9), strict=True):
        assert [scored.node for scored in mine] == [scored.node for scored in expected]
        assert [scored.score for scored in mine] == pytest.approx([scored.score for scored in expected], abs=1e-6)
    assert again.nodes == store.nodes
    assert torch.equal(again.embeddings, store.embeddings)
    assert (len(again._held), len(again._passages)) == (0, 0)


def test_a_mapped_store_can_be_saved_over_itself(tmp_path: Path) -> None:
    rows = [KnowledgeNode("ü", "one\ntwo\u2028\r three\ud800", {"n": [1]}), *numbered(50)]
    store, queries = InMemoryKnowledgeStore(), vectors(5, 16, seed=3)
    store.add(rows, vectors(51, 16))
    store.encoder_fingerprint, store.corpus_fingerprint = "encoder", "corpus"
    store.save(tmp_path / "store")
    again = mapped(tmp_path / "store")
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    again.save(tmp_path / "store")
    again.save(tmp_path / "other")
    for folder in ("store", "other"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before
    assert again.nodes == rows
    assert again.search(queries, 9) == mapped(tmp_path / "other").search(queries, 9)
    assert mapped(tmp_path / "other").encoder_fingerprint == "encoder"


def test_a_change_takes_a_mapped_store_into_memory(tmp_path: Path) -> None:
    store_of(20).save(tmp_path / "store")
    for change in (
        lambda store: store.add(nodes("new"), torch.ones(1, 16)),
        lambda store: store.delete(["p3"]),
        lambda store: store.replace_embeddings(torch.zeros(20, 16)),
    ):
        store = mapped(tmp_path / "store")
        change(store)
        assert store._mapped is None
        store.save(tmp_path / "store2")
        again = InMemoryKnowledgeStore.load(tmp_path / "store2")
        assert (again.nodes, again.embeddings.tolist()) == (store.nodes, store.embeddings.tolist())
    store = mapped(tmp_path / "store")
    store.clear()
    assert len(store) == 0


@pytest.mark.parametrize("damage", [b'{"id": "p1"}', b"no JSON", b'["a", "list"]'])
def test_a_damaged_passage_is_told_when_it_is_read(tmp_path: Path, damage: bytes) -> None:
    store_of(5).save(tmp_path / "store")
    lines = (tmp_path / "store" / NODES_FILE).read_bytes().splitlines(keepends=True)
    lines[1] = damage.ljust(len(lines[1]) - 1) + b"\n"
    (tmp_path / "store" / NODES_FILE).write_bytes(b"".join(lines))
    store = mapped(tmp_path / "store")
    assert store.nodes_at([0, 4]) == [*numbered(1), *numbered(1, 4)]
    with pytest.raises(KnowledgeStoreError, match="damaged"):
        store.nodes_at([0, 1])


@pytest.mark.parametrize("offsets", [True, False])
def test_passages_that_are_found_by_offsets_or_by_a_look_at_all_of_them(tmp_path: Path, offsets: bool) -> None:
    """Earlier versions kept no offsets."""
    rows = [KnowledgeNode("ü", "one\ntwo\u2028\r three\ud800", {"n": [1]}), *numbered(50)]
    store, file = InMemoryKnowledgeStore(), tmp_path / "store" / EMBEDDINGS_FILE
    store.add(rows, vectors(51, 16))
    store.save(tmp_path / "store")
    with safe_open(file, framework="pt") as found:
        metadata, lines = found.metadata(), (file.parent / NODES_FILE).read_bytes().splitlines(keepends=True)
        assert found.get_tensor("offsets").tolist() == [0, *itertools.accumulate(map(len, lines))]
    if not offsets:
        save_file({"embeddings": store.embeddings.clone()}, file, metadata)
    again = mapped(tmp_path / "store")
    assert again.nodes_at([50, 0, 7]) == [rows[50], rows[0], rows[7]]
    assert torch.equal(again.embeddings, store.embeddings)
    assert torch.equal(InMemoryKnowledgeStore.load(tmp_path / "store").embeddings, store.embeddings)
    content = (file.parent / NODES_FILE).read_bytes()
    for damaged in (content[:-1], content + b"{}", b"\xff" * len(content)):
        (file.parent / NODES_FILE).write_bytes(damaged)
        with pytest.raises(KnowledgeStoreError, match="not as long as it was written"):
            mapped(tmp_path / "store")


def test_what_an_earlier_version_appended_is_brought_up_to_date_by_the_next_index(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path
) -> None:
    """A store with changes beside it is older than its corpus: nothing searches it before `fedrag index` has run."""
    rows = [*ROWS, {"id": "new", "text": "new"}]
    build_index(config_of(), SilentReporter())
    journal = tmp_path / "store" / "changes.jsonl"
    moved = config_of("moved", {"type": "faiss"})
    for stays in (ROWS, rows):
        journal.write_text('{"checksum": "0", "change": {}}\n')
        config = config_of(rows=stays)
        with pytest.raises(KnowledgeStoreError, match="built from other passages") as caught:
            build_rag_system(config, with_generator=False)
        assert "fedrag index" in caught.value.hint
        with pytest.raises(KnowledgeStoreError, match="has changes beside it") as caught:
            move_index(config, moved, SilentReporter())
        assert "fedrag index" in caught.value.hint
        encoded.clear()
        assert build_index(config, SilentReporter())["kept"] == 24
        assert (sum(encoded), journal.exists()) == (len(stays) - 24, False)
        assert len(build_rag_system(config, with_generator=False).knowledge_store) == len(stays)


def test_a_passage_twice_is_found_when_the_store_is_taken_into_memory(tmp_path: Path) -> None:
    store_of(5).save(tmp_path / "store")
    lines = (tmp_path / "store" / NODES_FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / "store" / NODES_FILE).write_bytes(b"".join([lines[0], lines[0], *lines[2:]]))
    with pytest.raises(KnowledgeStoreError, match="'p0' occurs twice"):
        mapped(tmp_path / "store").delete(["p1"])


def test_a_mapped_store_needs_a_path(write_config: WriteConfig) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load_config(write_config(rag_system={"knowledge_store": {"memory_map": True}}))
    (problem,) = caught.value.problems
    assert (problem.path, "needs a path" in problem.message) == ("rag_system.knowledge_store.memory_map", True)


WRITE = """
from fedrag_cli.rag.config import EMBEDDINGS_FILE
from fedrag_cli.rag.knowledge_stores.store_files import write_embeddings, write_nodes
FOLDER.mkdir()
blocks = (torch.randn(1000, DIMENSION) for _ in range(PASSAGES // 1000))
about = {"format": "fedrag-memory-store-1"}
offsets = write_nodes(passages(), FOLDER)
write_embeddings(FOLDER / EMBEDDINGS_FILE, blocks, (PASSAGES, DIMENSION), torch.float32, about, offsets)
"""
SEARCH = """
InMemoryKnowledgeStore().build_report(), queries() @ queries().T
before = memory("VmRSS")
store = InMemoryKnowledgeStore.from_config(MemoryStoreConfig(path=str(FOLDER), memory_map=True))
for count in (1, 64):
    assert len(store.search(queries(count), 10)) == count
print(before, memory("VmHWM"))
"""


@pytest.mark.slow
@needs_proc
def test_a_mapped_store_takes_little_memory(tmp_path: Path) -> None:
    arguments = ["200000", "384", str(tmp_path / "store")]
    subprocess.run([sys.executable, "-c", MEASURE + WRITE, *arguments], check=True)
    told = subprocess.run(
        [sys.executable, "-c", MEASURE + SEARCH, *arguments], check=True, capture_output=True, text=True
    )
    before, peak = map(int, told.stdout.split())
    # The embeddings alone are 307 MB.
    assert peak - before < 100e6


# Half precision


@pytest.mark.parametrize("dtype", HALVES)
def test_half_a_store_searches_its_rounded_embeddings_in_float32(dtype: str, tmp_path: Path) -> None:
    store, full = store_of(300, dtype=dtype), store_of(300)
    rounded = full.embeddings.to(getattr(torch, dtype)).float()
    assert torch.equal(store.embeddings, rounded)
    assert store.embeddings_at(torch.tensor([[3], [7]])).dtype == torch.float32
    queries = vectors(9, 16, seed=4)
    scores, positions = store.search_positions(queries, 10)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (queries @ rounded.T).topk(10).values)
    assert torch.equal(positions, (queries @ rounded.T).topk(10).indices)
    store.save(tmp_path / "half")
    full.save(tmp_path / "full")
    size, whole = ((tmp_path / name / EMBEDDINGS_FILE).stat().st_size for name in ("half", "full"))
    assert whole - size == 300 * 16 * 2
    for again in (InMemoryKnowledgeStore.load(tmp_path / "half"), mapped(tmp_path / "half", dtype=dtype)):
        assert str(again.dtype) == f"torch.{dtype}"
        assert torch.equal(again.embeddings, rounded)


def test_numbers_that_a_half_format_cannot_hold_are_refused() -> None:
    store = store_of(3, dtype="float16")
    large = torch.tensor([1.0, 65504.0, 65520.0])[:, None].repeat(1, 16)
    with pytest.raises(KnowledgeStoreError, match="'c' has a number that is too large for float16") as caught:
        store.add(nodes("a", "b", "c"), large)
    assert "bfloat16" in caught.value.hint
    with pytest.raises(KnowledgeStoreError, match="'p2' has a number that is too large"):
        store.replace_embeddings(large)
    assert len(store) == 3
    store_of(3, dtype="bfloat16").add(nodes("a", "b", "c"), large)


def test_a_store_of_another_number_format_is_refused(tmp_path: Path) -> None:
    store_of(3, dtype="bfloat16").save(tmp_path / "store")
    with pytest.raises(KnowledgeStoreError, match="saved as bfloat16, but the config says float32") as caught:
        InMemoryKnowledgeStore.from_config(MemoryStoreConfig(path=str(tmp_path / "store")))
    assert "fedrag index" in caught.value.hint


@pytest.mark.parametrize("dtype", HALVES)
def test_the_reported_recall_is_that_against_float32(dtype: str) -> None:
    # Close embeddings, of which rounding mixes up some.
    embeddings = torch.nn.functional.normalize(torch.ones(900, 8) + 0.1 * vectors(900, 8))
    full = InMemoryKnowledgeStore()
    full.add(numbered(900), embeddings)
    assert full.build_report() == {}
    half = converted_store(full, MemoryStoreConfig(dtype=dtype))  # type: ignore[arg-type]
    sample = torch.randperm(900, generator=torch.Generator().manual_seed(0))[:200]
    rounded = embeddings.to(getattr(torch, dtype)).float()
    shares = []
    for own in sample.tolist():
        exact, found = ((rows @ embeddings[own]).topk(11).indices.tolist() for rows in (embeddings, rounded))
        shares.append(len((set(exact) & set(found)) - {own}) / len(set(exact) - {own}))
    told = half.build_report()
    assert told == {"dtype": dtype, "recall@10": pytest.approx(sum(shares) / 200, abs=0.005)}
    low, high = {"float16": (0.8, 0.99), "bfloat16": (0.4, 0.8)}[dtype]
    assert low < told["recall@10"] < high
    half.delete(["p0"])
    assert half.build_report() == {"dtype": dtype}


def test_stores_are_converted_between_number_formats() -> None:
    full = store_of(50)
    full.encoder_fingerprint, full.corpus_fingerprint = "encoder", "corpus"
    assert converted_store(full, MemoryStoreConfig()) is full
    half = converted_store(full, MemoryStoreConfig(dtype="float16"))
    assert converted_store(half, MemoryStoreConfig(dtype="float16")) is half
    back = converted_store(half, MemoryStoreConfig())
    for store in (half, back):
        assert torch.equal(store.embeddings, full.embeddings.half().float())
        assert store.nodes == full.nodes
        assert (store.encoder_fingerprint, store.corpus_fingerprint) == ("encoder", "corpus")
    assert converted_store(half, MemoryStoreConfig(dtype="bfloat16")).build_report() == {"dtype": "bfloat16"}
    faiss = converted_store(half, FaissStoreConfig())
    assert isinstance(faiss, FaissKnowledgeStore)
    # What was lost on the way in is not measured on the way back.
    assert converted_store(faiss, MemoryStoreConfig(dtype="float16")).build_report() == {"dtype": "float16"}
    whole = converted_store(full, FaissStoreConfig())
    assert converted_store(whole, MemoryStoreConfig(dtype="float16")).build_report()["recall@10"] == 1


def test_the_index_is_built_and_moved_in_half_precision(write_config: WriteConfig, tmp_path: Path) -> None:
    def config(name: str, **store: Any) -> Any:
        path = write_config(rag_system={"knowledge_store": {"path": str(tmp_path / name), **store}, "top_k": 2})
        return load_config(path.rename(path.with_name(f"{name}.yaml")))

    full, half = config("full"), config("half", dtype="float16", memory_map=True)
    assert "recall@10" not in build_index(full, SilentReporter())
    for told in (build_index(half, SilentReporter()), move_index(full, half, SilentReporter())):
        assert (told["dtype"], told["passages"]) == ("float16", 24)
        assert 0.9 < told["recall@10"] <= 1
    expected = build_rag_system(full).retrieve("where is the owl ?", 24)
    found = build_rag_system(half).retrieve("where is the owl ?", 24)
    assert [scored.score for scored in found] == pytest.approx([scored.score for scored in expected], abs=1e-3)
    json.dumps(told)
