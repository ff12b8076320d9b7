"""What every knowledge store promises, and what the one in memory promises besides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_store import PlainStore
from stores import nodes, numbered, vectors
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import EMBEDDINGS_FILE, NODES_FILE, FaissStoreConfig, MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.faiss_store import FaissKnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.knowledge_stores.qdrant_store import QdrantKnowledgeStore

MakeStore = Callable[[], KnowledgeStore]
LoadStore = Callable[[Path], KnowledgeStore]


def faiss_store(**settings: Any) -> tuple[MakeStore, LoadStore]:
    config = FaissStoreConfig(**settings)
    return lambda: FaissKnowledgeStore(config), lambda directory: FaissKnowledgeStore.load(directory, config)


def memory_store_of(**settings: Any) -> tuple[MakeStore, LoadStore]:
    config = MemoryStoreConfig(**settings)
    return (
        lambda: InMemoryKnowledgeStore(config=config),
        lambda directory: InMemoryKnowledgeStore.load(directory, config),
    )


# A new store comes here: its name, how to make an empty one, and how to load a saved one. The settings of approximate
# ones make them exact over as few passages as there are here.
STORES: dict[str, tuple[MakeStore, LoadStore]] = {
    "memory": (InMemoryKnowledgeStore, InMemoryKnowledgeStore.load),
    "memory mapped": memory_store_of(path="unused", memory_map=True),
    "faiss flat": faiss_store(),
    "faiss ivf": faiss_store(index="ivf", nlist=4, nprobe=4),
    "faiss hnsw": faiss_store(index="hnsw", m=64, ef_search=512),
    "faiss mapped": faiss_store(path="unused", memory_map=True),
    "qdrant": (QdrantKnowledgeStore, QdrantKnowledgeStore.load),
    "plug-in": (PlainStore, PlainStore.load),
}


def ids_of(store: KnowledgeStore, query: list[float], top_k: int) -> list[str]:
    return [scored.node.id for scored in store.search(torch.tensor([query]), top_k)[0]]


@pytest.mark.parametrize("kind", list(STORES))
class TestContract:
    """Holds for every knowledge store."""

    @pytest.fixture
    def empty(self, kind: str) -> KnowledgeStore:
        return STORES[kind][0]()

    @pytest.fixture
    def load(self, kind: str) -> LoadStore:
        return STORES[kind][1]

    @pytest.fixture
    def store(self, empty: KnowledgeStore) -> KnowledgeStore:
        empty.add(nodes("a", "b", "c"), torch.eye(3))
        return empty

    def test_added_passages_are_found_with_their_scores(self, store: KnowledgeStore) -> None:
        found = store.search(torch.tensor([[0.1, 0.9, 0.5], [1.0, -2.0, 0.0]]), 3)
        assert [[scored.node.id for scored in row] for row in found] == [["b", "c", "a"], ["a", "c", "b"]]
        assert [scored.score for scored in found[0]] == pytest.approx([0.9, 0.5, 0.1])
        assert found[0][0].node == nodes("b")[0]
        assert len(store) == 3

    def test_an_id_that_is_there_gets_its_new_vector_and_text(self, store: KnowledgeStore) -> None:
        changed = KnowledgeNode("a", "new text", {"title": "new"})
        store.add([*nodes("d"), changed], torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 2.0]]))
        assert len(store) == 4
        assert ids_of(store, [1.0, 0.0, 0.0], 1) != ["a"] or store.search(torch.eye(3)[:1], 1)[0][0].score == 0
        best = store.search(torch.tensor([[0.0, 0.0, 1.0]]), 2)[0]
        assert [(scored.node.id, scored.score) for scored in best] == [("a", 2.0), ("c", 1.0)]
        assert best[0].node == changed

    def test_deleted_passages_are_gone(self, store: KnowledgeStore) -> None:
        assert store.delete(["b", "unknown", "b"]) == 1
        assert len(store) == 2
        assert ids_of(store, [0.0, 1.0, 0.5], 2) == ["c", "a"]
        with pytest.raises(KnowledgeStoreError, match="top_k is 3"):
            store.search(torch.eye(3), 3)
        store.add(nodes("b"), torch.tensor([[0.0, 3.0, 0.0]]))
        assert ids_of(store, [0.0, 1.0, 0.0], 1) == ["b"]
        assert store.delete([]) == 0

    def test_a_store_may_be_deleted_to_the_last_passage_and_filled_again(self, store: KnowledgeStore) -> None:
        assert store.delete(["a", "b", "c"]) == 3
        assert len(store) == 0
        with pytest.raises(KnowledgeStoreError, match="empty"):
            store.search(torch.eye(3), 1)
        store.add(nodes("x"), torch.ones(1, 5))
        assert ids_of(store, [1.0] * 5, 1) == ["x"]

    def test_clear_really_clears(self, store: KnowledgeStore) -> None:
        store.encoder_fingerprint = "one"
        store.clear()
        assert len(store) == 0
        assert store.delete(["a"]) == 0
        with pytest.raises(KnowledgeStoreError, match="empty"):
            store.search(torch.eye(3), 1)
        store.require_encoder("another")
        store.add(nodes("x", "a"), torch.eye(2))
        assert ids_of(store, [0.0, 1.0], 2) == ["a", "x"]

    def test_an_empty_store_is_searched_in_vain(self, empty: KnowledgeStore) -> None:
        with pytest.raises(KnowledgeStoreError, match="empty") as caught:
            empty.search(torch.eye(3), 1)
        assert caught.value.hint
        empty.add([], torch.zeros(0, 3))
        assert len(empty) == 0

    @pytest.mark.parametrize("top_k", [0, -1, 4, 500])
    def test_top_k_out_of_range_names_the_range(self, store: KnowledgeStore, top_k: int) -> None:
        with pytest.raises(KnowledgeStoreError, match=f"top_k is {top_k}, .*3 passages") as caught:
            store.search(torch.eye(3), top_k)
        assert "1 to 3" in caught.value.hint

    @pytest.mark.parametrize("shape", [(1, 2), (1, 4), (3,), (1, 1, 3)])
    def test_query_embeddings_of_another_size_are_refused(self, store: KnowledgeStore, shape: tuple[int, ...]) -> None:
        with pytest.raises(KnowledgeStoreError, match="shape"):
            store.search(torch.zeros(shape), 1)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_query_embeddings_that_are_not_finite_are_refused(self, store: KnowledgeStore, value: float) -> None:
        queries = torch.eye(3)
        queries[1, 2] = value
        with pytest.raises(KnowledgeStoreError, match="query 1 is not finite"):
            store.search(queries, 2)

    @pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3, 3), (2,), (2, 3, 1)])
    def test_new_embeddings_of_another_size_are_refused_and_nothing_changes(
        self, store: KnowledgeStore, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(KnowledgeStoreError, match="embeddings"):
            store.add(nodes("a", "x"), torch.zeros(shape))
        assert len(store) == 3
        assert ids_of(store, [1.0, 0.5, 0.0], 3) == ["a", "b", "c"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_vector_that_is_not_finite_is_named_by_its_id(self, store: KnowledgeStore, value: float) -> None:
        bad = torch.zeros(3, 3)
        bad[1, 2] = value
        with pytest.raises(KnowledgeStoreError, match="'y' is not finite"):
            store.add(nodes("a", "y", "z"), bad)
        assert len(store) == 3
        assert ids_of(store, [1.0, 0.5, 0.0], 3) == ["a", "b", "c"]

    def test_an_id_twice_in_one_call_is_refused(self, store: KnowledgeStore) -> None:
        with pytest.raises(KnowledgeStoreError, match="'x' occurs twice"):
            store.add(nodes("x", "y", "x"), torch.zeros(3, 3))
        assert len(store) == 3

    def test_zero_vectors_are_fine(self, store: KnowledgeStore) -> None:
        store.add(nodes("zero"), torch.zeros(1, 3))
        assert ids_of(store, [1.0, -1.0, -1.0], 2) == ["a", "zero"]
        assert [scored.score for scored in store.search(torch.zeros(1, 3), 4)[0]] == [0.0] * 4

    @pytest.mark.parametrize("top_k", [1, 2, 7, 49, 50])
    def test_equal_scores_come_in_the_order_of_the_passages(self, empty: KnowledgeStore, top_k: int) -> None:
        values = torch.tensor([[1.0], [0.0]]).repeat(25, 1)
        empty.add(numbered(50), values)
        even, odd = [f"p{n}" for n in range(0, 50, 2)], [f"p{n}" for n in range(1, 50, 2)]
        assert ids_of(empty, [1.0], top_k) == (even + odd)[:top_k]
        assert ids_of(empty, [-1.0], top_k) == (odd + even)[:top_k]
        assert ids_of(empty, [0.0], top_k) == [f"p{n}" for n in range(top_k)]

    @pytest.mark.parametrize("top_k", [1, 5, 200])
    def test_the_order_equals_brute_force(self, empty: KnowledgeStore, top_k: int) -> None:
        # Whole numbers make exact scores with many ties.
        stored = torch.randint(-3, 4, (200, 6), generator=torch.Generator().manual_seed(1)).float()
        queries = torch.randint(-3, 4, (17, 6), generator=torch.Generator().manual_seed(2)).float()
        for start in range(0, 200, 37):
            empty.add(numbered(min(37, 200 - start), start), stored[start : start + 37])
        scores, positions = empty.search_positions(queries, top_k)
        for row in range(17):
            exact = [float(stored[n] @ queries[row]) for n in range(200)]
            expected = sorted(range(200), key=lambda n: (-exact[n], n))[:top_k]
            assert positions[row].tolist() == expected
            assert scores[row].tolist() == [exact[n] for n in expected]
            assert [node.id for node in empty.nodes_at(expected)] == [f"p{n}" for n in expected]

    def test_a_batch_equals_single_queries(self, empty: KnowledgeStore) -> None:
        empty.add(numbered(300), vectors(300, 16))
        queries = vectors(40, 16, seed=1)
        batch = empty.search(queries, 10)
        for row, query in zip(batch, queries, strict=True):
            single = empty.search(query[None], 10)[0]
            assert [scored.node.id for scored in single] == [scored.node.id for scored in row]
            assert [scored.score for scored in single] == pytest.approx([scored.score for scored in row], abs=1e-5)

    def test_nodes_and_embeddings_are_given_by_position(self, empty: KnowledgeStore) -> None:
        stored = vectors(20, 4)
        empty.add(numbered(20), stored)
        _, positions = empty.search_positions(vectors(3, 4, seed=1), 5)
        embeddings = empty.embeddings_at(positions)
        assert embeddings.shape == (3, 5, 4)
        assert torch.equal(embeddings, stored[positions])
        for row in positions.tolist():
            assert [node.id for node in empty.nodes_at(row)] == [f"p{n}" for n in row]
        assert empty.nodes_at([]) == []

    def test_the_store_keeps_copies_not_the_callers_tensor(self, empty: KnowledgeStore) -> None:
        mine = torch.eye(3)
        empty.add(nodes("a", "b", "c"), mine)
        mine.zero_()
        assert [scored.score for scored in empty.search(torch.eye(3), 1)[2]] == [1.0]

    def test_embeddings_of_other_number_formats_and_with_gradient_are_taken(self, empty: KnowledgeStore) -> None:
        empty.add(nodes("a"), torch.ones(1, 2, dtype=torch.float64, requires_grad=True))
        empty.add(nodes("b"), torch.tensor([[2, 0]]))
        empty.add(nodes("c"), torch.ones(1, 2, dtype=torch.bfloat16))
        found = empty.search(torch.tensor([[1.0, 0.0]], requires_grad=True), 1)
        assert [scored.node.id for scored in found[0]] == ["b"]
        with torch.inference_mode():
            frozen = torch.ones(1, 2)
        empty.add(nodes("d"), frozen)
        assert not empty.embeddings_at(torch.tensor([0, 1, 3])).requires_grad

    def test_a_saved_store_loads_exactly(self, empty: KnowledgeStore, load: LoadStore, tmp_path: Path) -> None:
        rows = [
            KnowledgeNode("ü", "line one\nline two\u2028\r three", {"n": 1, "nested": {"list": [1, 2.5, None, True]}}),
            KnowledgeNode("1", '{"not": "json"}', {}),
            KnowledgeNode("🦉", "日本語", {"title": "\x00\x85"}),
        ]
        empty.add([*rows, *numbered(50)], vectors(53, 8))
        empty.delete(["p7"])
        empty.encoder_fingerprint = "abc-def"
        empty.save(tmp_path / "deep" / "store")
        again = load(tmp_path / "deep" / "store")
        queries = vectors(9, 8, seed=5)
        assert again.search(queries, 52) == empty.search(queries, 52)
        assert torch.equal(again.embeddings_at(torch.arange(52)), empty.embeddings_at(torch.arange(52)))
        assert again.nodes_at(range(52)) == empty.nodes_at(range(52))
        again.require_encoder("abc-def")
        with pytest.raises(KnowledgeStoreError):
            again.require_encoder("abc")

    def test_saving_replaces_the_old_store_and_leaves_nothing_else(
        self, store: KnowledgeStore, load: LoadStore, tmp_path: Path
    ) -> None:
        store.save(tmp_path / "store")
        store.delete(["a"])
        store.save(tmp_path / "store")
        assert len(load(tmp_path / "store")) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    def test_a_loaded_store_can_grow(self, store: KnowledgeStore, load: LoadStore, tmp_path: Path) -> None:
        store.save(tmp_path / "store")
        again = load(tmp_path / "store")
        again.add(nodes("d", "a"), torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]))
        assert ids_of(again, [1.0, 0.5, 0.0], 2) == ["d", "a"]

    def test_a_missing_store_is_an_error_with_a_hint(self, load: LoadStore, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
            with pytest.raises(KnowledgeStoreError) as caught:
                load(path)
            assert str(path) in caught.value.message
            assert "fedrag index" in caught.value.hint

    def test_every_torn_or_missing_file_is_an_error(
        self, store: KnowledgeStore, load: LoadStore, tmp_path: Path
    ) -> None:
        store.save(tmp_path / "store")
        files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
        assert files
        for path in files:
            content = path.read_bytes()
            for damaged in (b"", content[: len(content) // 3], content[:-5], b"\xff" * len(content)):
                path.write_bytes(damaged)
                with pytest.raises(KnowledgeStoreError):
                    load(tmp_path / "store")
            path.unlink()
            with pytest.raises(KnowledgeStoreError):
                load(tmp_path / "store")
            path.write_bytes(content)
        assert len(load(tmp_path / "store")) == 3

    def test_passages_and_dimension_are_told(self, empty: KnowledgeStore) -> None:
        assert (empty.nodes, empty.dimension) == ([], 0)
        empty.add(numbered(3), vectors(3, 5))
        assert (empty.nodes, empty.dimension) == (numbered(3), 5)
        empty.nodes.clear()
        assert len(empty) == 3
        empty.clear()
        assert (empty.nodes, empty.dimension) == ([], 0)

    def test_all_embeddings_are_replaced_in_the_order_of_the_passages(self, empty: KnowledgeStore) -> None:
        empty.add(numbered(40), vectors(40, 4))
        empty.delete(["p3", "p17"])
        fresh = vectors(38, 4, seed=8)
        empty.replace_embeddings(fresh)
        assert torch.equal(empty.embeddings_at(torch.arange(38)), fresh)
        queries = vectors(5, 4, seed=9)
        assert torch.equal(empty.search_positions(queries, 3)[1], (queries @ fresh.T).topk(3).indices)
        kept = [f"p{n}" for n in range(40) if n not in (3, 17)]
        assert [node.id for node in empty.nodes] == kept
        for bad in (vectors(37, 4), vectors(38, 5), torch.full((38, 4), float("nan"))):
            with pytest.raises(KnowledgeStoreError):
                empty.replace_embeddings(bad)
        fresh.zero_()
        assert empty.embeddings_at(torch.arange(38)).abs().min() > 0
        empty.add(numbered(1, 90), torch.ones(1, 4))
        assert torch.equal(empty.embeddings_at(torch.tensor(38)), torch.ones(4))

    def test_mixed_adds_and_deletes_agree_with_a_plain_dictionary(self, empty: KnowledgeStore) -> None:
        numbers, expected = random.Random(2), {}
        for turn in range(40):
            ids = [f"p{n}" for n in numbers.sample(range(30), numbers.randint(1, 6))]
            if numbers.random() < 0.3:
                assert empty.delete(ids) == sum(expected.pop(id, None) is not None for id in ids)
                continue
            values = vectors(len(ids), 3, seed=turn)
            empty.add(nodes(*ids), values)
            expected.update(zip(ids, values, strict=True))
            assert [node.id for node in empty.nodes] == list(expected)
            stored = torch.stack(list(expected.values()))
            assert torch.equal(empty.embeddings_at(torch.arange(len(empty))), stored)
            assert empty.search_positions(stored[:1], 1)[1].item() == int((stored @ stored[0]).argmax())

    def test_a_loaded_store_is_changed_without_touching_its_folder(
        self, store: KnowledgeStore, load: LoadStore, tmp_path: Path
    ) -> None:
        store.save(tmp_path / "store")
        again = load(tmp_path / "store")
        again.replace_embeddings(-torch.eye(3))
        again.delete(["b"])
        assert ids_of(again, [-1.0, 0.0, 0.0], 1) == ["a"]
        del again
        assert ids_of(load(tmp_path / "store"), [0.0, 1.0, 0.0], 1) == ["b"]

    def test_both_fingerprints_are_saved(self, store: KnowledgeStore, load: LoadStore, tmp_path: Path) -> None:
        store.save(tmp_path / "bare")
        bare = load(tmp_path / "bare")
        assert (bare.encoder_fingerprint, bare.corpus_fingerprint) == (None, None)
        store.encoder_fingerprint, store.corpus_fingerprint = "encoder", "corpus"
        store.save(tmp_path / "full")
        full = load(tmp_path / "full")
        assert (full.encoder_fingerprint, full.corpus_fingerprint) == ("encoder", "corpus")
        full.clear()
        assert (full.encoder_fingerprint, full.corpus_fingerprint) == (None, None)

    def test_an_empty_store_is_saved(self, empty: KnowledgeStore, load: LoadStore, tmp_path: Path) -> None:
        empty.save(tmp_path / "store")
        again = load(tmp_path / "store")
        assert (len(again), again.dimension) == (0, 0)
        again.add(nodes("a"), torch.ones(1, 7))
        assert ids_of(again, [1.0] * 7, 1) == ["a"]

    def test_a_store_filled_by_another_encoder_is_refused_with_the_command_that_refreshes_it(
        self, store: KnowledgeStore
    ) -> None:
        store.require_encoder("any")
        store.encoder_fingerprint = "first"
        store.require_encoder("first")
        with pytest.raises(KnowledgeStoreError, match=r"another encoder \(first\).*\(second\)") as caught:
            store.require_encoder("second")
        assert "fedrag index" in caught.value.hint


# The store in memory


def memory_store(count: int = 3) -> InMemoryKnowledgeStore:
    store = InMemoryKnowledgeStore()
    store.add(numbered(count), vectors(count, 4))
    return store


def test_adding_one_at_a_time_to_many_seldom_copies_the_buffer() -> None:
    store = InMemoryKnowledgeStore()
    store.add(numbered(100_000), torch.zeros(100_000, 2))
    places = []
    for number in range(1000):
        store.add(nodes(f"new{number}"), torch.ones(1, 2))
        places.append(store.embeddings.data_ptr())
    assert len(set(places)) == 1
    assert len(store) == 101_000
    assert store.embeddings[100_000:].eq(1).all()


def test_adding_from_nothing_copies_the_buffer_a_logarithmic_number_of_times() -> None:
    store = InMemoryKnowledgeStore()
    places, copies = 0, 0
    for number in range(1000):
        store.add(nodes(f"new{number}"), torch.full((1, 2), float(number)))
        copies += store.embeddings.data_ptr() != places
        places = store.embeddings.data_ptr()
    assert copies <= 11
    assert store.embeddings[:, 0].tolist() == [float(number) for number in range(1000)]


def test_replacing_in_place_copies_nothing() -> None:
    store = memory_store()
    place = store.embeddings.data_ptr()
    store.add(numbered(3), vectors(3, 4, seed=3))
    assert store.embeddings.data_ptr() == place
    assert torch.equal(store.embeddings, vectors(3, 4, seed=3))


@pytest.mark.parametrize("when", ["before the passages", "after some passages"])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_while_saving_leaves_the_old_store_or_none(tmp_path: Path, when: str, old: bool) -> None:
    if old:
        memory_store().save(tmp_path / "store")
    torn = memory_store(5)
    # An object that JSON cannot hold stops the writing halfway.
    position = 0 if when == "before the passages" else 3
    torn._passages.nodes[position] = KnowledgeNode("x", "text", {"broken": object()})
    with pytest.raises((KnowledgeStoreError, TypeError)):
        torn.save(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == (["store"] if old else [])
    if old:
        assert len(InMemoryKnowledgeStore.load(tmp_path / "store")) == 3


def rewrite_nodes(folder: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    lines = (folder / NODES_FILE).read_text(encoding="utf-8").splitlines()
    changed = change([json.loads(line) for line in lines])
    (folder / NODES_FILE).write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[0]],
        lambda rows: [rows[0], rows[0], rows[2]],
        lambda rows: [rows[0], ["a", "list"], rows[2]],
        lambda rows: [rows[0], {"id": "p1"}, rows[2]],
        lambda rows: [rows[0], {**rows[1], "unknown": 1}, rows[2]],
    ],
    ids=["one less", "one more", "an id twice", "no mapping", "a field less", "a field more"],
)
def test_passages_that_do_not_fit_the_embeddings_are_an_error(
    tmp_path: Path, change: Callable[[list[Any]], list[Any]]
) -> None:
    memory_store().save(tmp_path / "store")
    rewrite_nodes(tmp_path / "store", change)
    with pytest.raises(KnowledgeStoreError):
        InMemoryKnowledgeStore.load(tmp_path / "store")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"embeddings": torch.zeros(3, 4)}, {"format": "something-else"}),
        ({"embeddings": torch.zeros(3, 4)}, None),
        ({"vectors": torch.zeros(3, 4)}, {"format": "fedrag-memory-store-1"}),
        ({"embeddings": torch.zeros(3)}, {"format": "fedrag-memory-store-1"}),
        ({"embeddings": torch.tensor(1.0)}, {"format": "fedrag-memory-store-1"}),
        ({"embeddings": torch.full((3, 4), float("nan"))}, {"format": "fedrag-memory-store-1"}),
    ],
    ids=["another format", "no format", "another name", "one dimension", "a scalar", "nan"],
)
def test_embeddings_of_another_form_are_an_error(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    from safetensors.torch import save_file

    memory_store().save(tmp_path / "store")
    save_file(tensors, tmp_path / "store" / EMBEDDINGS_FILE, metadata)
    with pytest.raises(KnowledgeStoreError):
        InMemoryKnowledgeStore.load(tmp_path / "store")


def test_a_config_opens_the_saved_store_or_an_empty_one(tmp_path: Path) -> None:
    memory_store().save(tmp_path / "store")
    assert len(InMemoryKnowledgeStore.from_config(MemoryStoreConfig(path=str(tmp_path / "store")))) == 3
    assert len(InMemoryKnowledgeStore.from_config(MemoryStoreConfig(path=str(tmp_path / "nowhere")))) == 0
    assert len(InMemoryKnowledgeStore.from_config(MemoryStoreConfig())) == 0
