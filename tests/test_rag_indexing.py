"""`fedrag index` encodes what is new, goes on where it was stopped, and ends with the store of a fresh build."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows, write_rows
from sentence_transformers import SentenceTransformer

from fedrag_cli.cli.main import main
from fedrag_cli.config import Config, load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import FedRAGError, KnowledgeStoreError, RunInterruptedError
from fedrag_cli.rag import indexing
from fedrag_cli.rag import partial_index as partial_index_module
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.changes import find_changes
from fedrag_cli.rag.indexing import build_index
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.qdrant_connection import in_memory
from fedrag_cli.rag.moving import move_index
from fedrag_cli.rag.opening import open_store
from fedrag_cli.rag.partial_index import partial_file
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.runs.reporting import SilentReporter

WriteConfig = Callable[..., Path]
Rows = list[dict[str, Any]]
STORES: dict[str, dict[str, Any]] = {
    "memory": {"type": "memory"},
    "memory mapped": {"type": "memory", "memory_map": True},
    "faiss flat": {"type": "faiss"},
    "faiss hnsw mapped": {"type": "faiss", "index": "hnsw", "memory_map": True},
    "qdrant": {"type": "qdrant"},
}
# Another composition of the batches changes the last bits of an embedding: by 1.6e-7 at most where the 174 passages of
# the quickstart were encoded by all-MiniLM-L6-v2 one by one and 64 at once. What is kept keeps the bits it had.
TOLERANCE = 1e-6
ROWS = data_rows()["corpus"]
CHANGES: dict[str, tuple[Rows, dict[str, int]]] = {
    "nothing": (ROWS, {"encoded": 0, "kept": 24, "removed": 0}),
    "appended": ([*ROWS, {"id": "new", "text": "the red barn ."}], {"encoded": 1, "kept": 24, "removed": 0}),
    "text": ([*ROWS[:5], {**ROWS[5], "text": "the water ."}, *ROWS[6:]], {"encoded": 1, "kept": 23, "removed": 0}),
    "metadata": ([*ROWS[:5], {**ROWS[5], "title": "t"}, *ROWS[6:]], {"encoded": 0, "kept": 24, "removed": 0}),
    "removed": ([*ROWS[:3], *ROWS[5:]], {"encoded": 0, "kept": 22, "removed": 2}),
    "order": (ROWS[::-1], {"encoded": 0, "kept": 24, "removed": 0}),
    "other id": ([{**ROWS[0], "id": "x"}, *ROWS[1:]], {"encoded": 0, "kept": 24, "removed": 1}),
    "removed before changed metadata": ([*ROWS[1:7], {**ROWS[7], "title": "t"}, *ROWS[8:]],
                                        {"encoded": 0, "kept": 23, "removed": 1}),
    "inserted": ([{"id": "new", "text": "first"}, *ROWS], {"encoded": 1, "kept": 24, "removed": 0}),
    "swapped": ([{**ROWS[0], "text": ROWS[1]["text"]}, {**ROWS[1], "text": ROWS[0]["text"]}, *ROWS[2:]],
                {"encoded": 0, "kept": 24, "removed": 0}),
    "all at once": ([{**ROWS[1], "text": "the tree"}, *ROWS[4:], {"id": "n", "text": "x y"}, ROWS[0]],
                    {"encoded": 2, "kept": 21, "removed": 2}),
}  # fmt: skip


class Notes(SilentReporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes the number of texts of every batch that goes through an encoder."""
    sizes: list[int] = []
    embed = SentenceTransformerRetriever.embed

    def counting(self: SentenceTransformerRetriever, encoder: Any, features: Any) -> torch.Tensor:
        sizes.append(len(features["input_ids"]))
        return embed(self, encoder, features)

    monkeypatch.setattr(SentenceTransformerRetriever, "embed", counting)
    return sizes


@pytest.fixture
def config_of(write_config: WriteConfig, models: dict[str, Path], tmp_path: Path) -> Callable[..., Config]:
    """Return a function that gives a config with batches of 4 and a store at a place."""

    def made(
        place: str = "store", store: dict[str, Any] | None = None, rows: Rows | None = None, **retriever: Any
    ) -> Config:
        section = {
            "retriever": {"model": str(models["retriever"]), "batch_size": 4, **retriever},
            "knowledge_store": {**(store or {}), "path": str(tmp_path / place)},
        }
        path = write_config(rag_system=section)
        if rows is not None:
            write_rows(tmp_path / "corpus.jsonl", rows)
        return load_config(path)

    return made


def opened(config: Config) -> KnowledgeStore:
    return open_store(config.rag_system.knowledge_store)


def assert_equal_stores(config: Config, other: Config, tolerance: float) -> None:
    found, expected = opened(config), opened(other)
    everything = torch.arange(len(expected))
    queries = torch.nn.functional.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)))
    assert found.nodes == expected.nodes
    assert found.embeddings_at(everything).sub(expected.embeddings_at(everything)).abs().max() <= tolerance
    results, wanted = (
        [[scored.node for scored in row] for row in store.search(queries, 5)] for store in (found, expected)
    )
    assert results == wanted
    assert found.encoder_fingerprint == expected.encoder_fingerprint
    assert found.corpus_fingerprint == expected.corpus_fingerprint


# What is encoded


@pytest.mark.parametrize(
    ("kind", "change"),
    [("memory", change) for change in CHANGES]
    + [(kind, change) for kind in list(STORES)[1:] for change in ("appended", "text", "all at once")],
)
def test_only_what_is_new_is_encoded_and_the_store_is_that_of_a_fresh_build(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path, kind: str, change: str
) -> None:
    rows, expected = CHANGES[change]
    config = config_of("store", STORES[kind])
    told = build_index(config, SilentReporter())
    assert [told[name] for name in ("passages", "encoded", "resumed", "kept", "removed")] == [24, 24, 0, 0, 0]
    before = opened(config)
    old = {node.id: (node.text, before.embeddings_at(torch.tensor(p))) for p, node in enumerate(before.nodes)}
    del before
    encoded.clear()
    told = build_index(config_of("store", STORES[kind], rows), SilentReporter())
    assert {name: told[name] for name in expected} == expected
    assert told["passages"] == len(rows) == told["encoded"] + told["kept"]
    assert sum(encoded) == expected["encoded"]
    assert not told["encoder_changed"]
    build_index(config_of("fresh", STORES[kind], rows), SilentReporter())
    # The fewer are encoded, the shorter the padding, so that new embeddings differ in the last bits at most.
    assert_equal_stores(config, config_of("fresh", STORES[kind], rows), TOLERANCE)
    after = opened(config)
    for position, node in enumerate(after.nodes):
        text, embedding = old.get(node.id, ("", None))
        if text == node.text:
            assert embedding is not None
            assert torch.equal(after.embeddings_at(torch.tensor(position)), embedding)
    left = {path.name for path in tmp_path.iterdir() if "store" in path.name}
    assert left == {"store"}
    del after
    encoded.clear()
    assert build_index(config, SilentReporter())["encoded"] == sum(encoded) == 0


@pytest.mark.parametrize("kind", list(STORES))
def test_an_unchanged_store_is_not_written_again(config_of: Callable[..., Config], tmp_path: Path, kind: str) -> None:
    config = config_of("store", STORES[kind])
    first = build_index(config, SilentReporter())
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "store").rglob("*")
              if path.is_file() and path.name != ".lock"}  # fmt: skip
    again = build_index(config, SilentReporter())
    assert all((path.stat().st_ino, path.read_bytes()) == found for path, found in before.items())
    for name in ("passages", "dimension", "truncated", "encoder_fingerprint", "corpus_fingerprint"):
        assert again[name] == first[name]
    assert again.get("recall@10") == first.get("recall@10")


@pytest.mark.parametrize(("kind", "other"), list(itertools.pairwise([*STORES, "memory"])))
def test_another_type_or_other_settings_take_the_embeddings_over(
    config_of: Callable[..., Config], encoded: list[int], kind: str, other: str
) -> None:
    build_index(config_of("store", STORES[kind]), SilentReporter())
    encoded.clear()
    told = build_index(config_of("store", STORES[other]), SilentReporter())
    assert (told["kept"], sum(encoded), told["type"]) == (24, 0, STORES[other]["type"])
    build_index(config_of("fresh", STORES[other]), SilentReporter())
    assert_equal_stores(config_of("store", STORES[other]), config_of("fresh", STORES[other]), 0)


def test_rounded_embeddings_are_kept_only_where_rounded_ones_are_wanted(
    config_of: Callable[..., Config], encoded: list[int]
) -> None:
    half = {"type": "memory", "dtype": "float16"}
    build_index(config_of("store", STORES["memory"]), SilentReporter())
    told = build_index(config_of("store", half), SilentReporter())
    assert (told["kept"], told["dtype"]) == (24, "float16")
    build_index(config_of("fresh", half), SilentReporter())
    assert_equal_stores(config_of("store", half), config_of("fresh", half), 0)
    for rows in ([*ROWS, {"id": "new", "text": "new"}], [{"id": "first", "text": "first"}, *ROWS]):
        encoded.clear()
        told = build_index(config_of("store", half, rows), SilentReporter())
        assert (told["kept"], sum(encoded)) == (24, 1)
        # Nothing is measured against embeddings that have lost their digits already.
        assert "recall@10" not in told
        build_index(config_of("fresh", half, rows), SilentReporter(), rebuild=True)
        assert_equal_stores(config_of("store", half), config_of("fresh", half, rows), 1e-3)
    for store in (STORES["memory"], STORES["faiss flat"], {"type": "memory", "dtype": "bfloat16"}):
        build_index(config_of("store", half), SilentReporter(), rebuild=True)
        reporter = Notes()
        told = build_index(config_of("store", store), reporter)
        assert (told["kept"], told["encoded"], told["encoder_changed"]) == (0, 24, False)
        assert any("rounded to float16" in note for note in reporter.notes)
        build_index(config_of("fresh", store), SilentReporter(), rebuild=True)
        assert_equal_stores(config_of("store", store), config_of("fresh", store), 0)


@pytest.mark.parametrize("kind", ["memory", "memory mapped", "faiss flat", "qdrant"])
def test_a_moved_store_knows_that_its_embeddings_were_rounded(
    config_of: Callable[..., Config], encoded: list[int], kind: str
) -> None:
    half = config_of("half", {"type": "memory", "dtype": "float16"})
    build_index(half, SilentReporter())
    moved, reporter = config_of("moved", STORES[kind]), Notes()
    assert move_index(half, moved, reporter)["rounded_to"] == "float16"
    assert any("rounded to float16 and stay so" in note and "--rebuild" in note for note in reporter.notes)
    encoded.clear()
    rows: Rows = [{"id": "new", "text": "new"}, *ROWS]
    for new in (0, 1):
        reporter = Notes()
        told = build_index(config_of("moved", STORES[kind], rows[1 - new :]), reporter)
        assert (told["kept"], sum(encoded), told["rounded_to"]) == (24, new, "float16")
        assert any("rounded to float16 before" in note and "--rebuild" in note for note in reporter.notes)
        assert opened(moved).rounded_to == "float16"
    # No digits come back on the way through another half, and no loss is measured against what lost some.
    for dtype in ("bfloat16", "float16"):
        told = move_index(moved, config_of(dtype, {"type": "memory", "dtype": dtype}, rows), SilentReporter())
        assert "recall@10" not in told
        assert told.get("rounded_to") == (None if dtype == "float16" else "float16")
    assert opened(config_of("bfloat16", {"type": "memory", "dtype": "bfloat16"}, rows)).rounded_to == "float16"
    reporter = Notes()
    told = build_index(moved, reporter, rebuild=True)
    assert (told["encoded"], told.get("rounded_to"), reporter.notes) == (25, None, [])
    assert opened(moved).rounded_to is None
    build_index(config_of("fresh", STORES[kind], rows), SilentReporter())
    assert_equal_stores(moved, config_of("fresh", STORES[kind], rows), 0)


@pytest.mark.parametrize("kind", ["memory", "faiss flat", "qdrant"])
def test_new_embeddings_for_all_have_all_digits(config_of: Callable[..., Config], kind: str) -> None:
    half = config_of("half", {"type": "memory", "dtype": "float16"})
    build_index(half, SilentReporter())
    move_index(half, config_of("moved", STORES[kind]), SilentReporter())
    store = opened(config_of("moved", STORES[kind]))
    store.replace_embeddings(store.embeddings)
    assert store.rounded_to is None
    half_store = opened(half)
    half_store.clear()
    assert half_store.rounded_to == "float16"


@pytest.mark.parametrize("kind", ["memory", "faiss flat", "qdrant"])
def test_a_store_of_other_passages_is_moved_over_only_where_that_is_asked_for(
    config_of: Callable[..., Config], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of("old", STORES[kind])
    (tmp_path / "config.yaml").rename(tmp_path / "old.yaml")
    write_rows(tmp_path / "corpus.jsonl", ROWS[2:])
    assert main(["index", str(tmp_path / "old.yaml"), "-q"]) == 0
    config = config_of("new", rows=ROWS)
    build_index(config, SilentReporter())
    command = ["index", str(tmp_path / "config.yaml"), "--to", str(tmp_path / "old.yaml"), "--json"]
    file = max((path for path in (tmp_path / "old").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for message in ("holds a knowledge store of other passages", "damaged"):
        capsys.readouterr()
        assert main(command) == 3
        error = json.loads(capsys.readouterr().out)["error"]
        assert message in error["message"]
        assert str(tmp_path / "old") in error["message"]
        assert "--replace" in error["hint"]
        file.write_bytes(file.read_bytes()[:-9])
    for _ in range(2):
        assert main([*command, "--replace"]) == 0
    assert main(command) == 0
    assert len(opened(load_config(tmp_path / "old.yaml"))) == 24
    assert main(["index", str(tmp_path / "config.yaml"), "--replace"]) == 2


def test_few_changes_are_added_to_the_journal_of_the_store_in_memory(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    build_index(config_of(), SilentReporter())
    before = (tmp_path / "store" / "embeddings.safetensors").stat().st_ino
    rows = [{**ROWS[0], "text": "the water ."}, *ROWS[2:], {"id": "new", "text": "new"}]
    told = build_index(config_of(rows=rows), SilentReporter())
    assert (told["encoded"], told["removed"]) == (2, 1)
    assert (tmp_path / "store" / "embeddings.safetensors").stat().st_ino == before
    build_index(config_of("fresh", rows=rows), SilentReporter())
    assert_equal_stores(config_of(), config_of("fresh", rows=rows), TOLERANCE)


def test_an_unchanged_index_writes_a_journal_out_for_a_store_that_stays_on_disk(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path
) -> None:
    rows = [*ROWS, {"id": "new", "text": "new"}]
    build_index(config_of(), SilentReporter())
    build_index(config_of(rows=rows), SilentReporter())
    journal = tmp_path / "store" / "changes.jsonl"
    # Where the store is taken into memory anyway, the journal may stay.
    build_index(config_of(rows=rows), SilentReporter())
    assert journal.exists()
    expected, encoded[:] = opened(config_of(rows=rows)), []
    mapped = config_of("store", STORES["memory mapped"], rows)
    assert opened(mapped)._mapped is None  # type: ignore[attr-defined]
    told = build_index(mapped, SilentReporter())
    assert (told["passages"], told["kept"], encoded) == (25, 25, [])
    assert not journal.exists()
    found = opened(mapped)
    assert found._mapped is not None  # type: ignore[attr-defined]
    assert found.nodes == expected.nodes
    assert torch.equal(found.embeddings, expected.embeddings)
    assert found.corpus_fingerprint == expected.corpus_fingerprint
    before = (tmp_path / "store" / "embeddings.safetensors").stat().st_ino
    build_index(mapped, SilentReporter())
    assert (tmp_path / "store" / "embeddings.safetensors").stat().st_ino == before


def test_a_collection_of_another_name_is_taken_over(config_of: Callable[..., Config], encoded: list[int]) -> None:
    build_index(config_of("store", {"type": "qdrant", "collection": "one"}), SilentReporter())
    encoded.clear()
    config = config_of("store", {"type": "qdrant", "collection": "two", "filter": {"title": "owl"}})
    assert (build_index(config, SilentReporter())["kept"], sum(encoded)) == (24, 0)
    assert [node.id for node in opened(config).nodes] == ["colour-owl", "home-owl"]
    # The filter hides passages from searches, not from the next index.
    assert build_index(config, SilentReporter())["kept"] == 24


@pytest.mark.parametrize(
    "change", [{"passage_prompt": "passage: "}, {"max_length": 6}, {"dtype": "bfloat16"}, {"model": "other"}]
)
def test_another_encoder_encodes_everything_anew_and_says_so(
    config_of: Callable[..., Config], models: dict[str, Path], encoded: list[int], change: dict[str, Any]
) -> None:
    change = {**change, "model": str(models["other_retriever"])} if "model" in change else change
    build_index(config_of(), SilentReporter())
    encoded.clear()
    reporter = Notes()
    told = build_index(config_of(rows=ROWS[1:], **change), reporter)
    assert (told["encoded"], told["kept"], told["removed"], told["encoder_changed"]) == (23, 0, 1, True)
    assert sum(encoded) == 23
    assert any("another encoder" in note for note in reporter.notes)
    build_index(config_of("fresh", rows=ROWS[1:], **change), SilentReporter())
    assert_equal_stores(config_of(**change), config_of("fresh", rows=ROWS[1:], **change), 0)


def test_a_setting_that_passages_do_not_depend_on_encodes_nothing(
    config_of: Callable[..., Config], encoded: list[int]
) -> None:
    build_index(config_of(), SilentReporter())
    encoded.clear()
    assert build_index(config_of(query_prompt="query: ", batch_size=3), SilentReporter())["kept"] == 24
    assert not encoded


def test_rebuild_encodes_everything(config_of: Callable[..., Config], encoded: list[int], tmp_path: Path) -> None:
    config = config_of()
    build_index(config, SilentReporter())
    store = opened(config)
    store.replace_embeddings(store.embeddings.flip(0))
    store.save(tmp_path / "store")
    encoded.clear()
    told = build_index(config, SilentReporter(), rebuild=True)
    assert (told["encoded"], told["kept"], told["removed"], sum(encoded)) == (24, 0, 0, 24)
    build_index(config_of("fresh"), SilentReporter())
    assert_equal_stores(config, config_of("fresh"), 0)


@pytest.mark.parametrize("kind", ["memory", "faiss flat", "qdrant"])
def test_a_damaged_store_is_built_anew_only_where_that_is_asked_for(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path, kind: str
) -> None:
    config = config_of("store", STORES[kind])
    build_index(config, SilentReporter())
    file = max(
        (path for path in (tmp_path / "store").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    encoded.clear()
    with pytest.raises(KnowledgeStoreError, match=r"damaged|differ") as caught:
        build_index(config, SilentReporter())
    assert "--rebuild" in caught.value.hint
    assert not encoded
    reporter = Notes()
    assert build_index(config, reporter, rebuild=True)["encoded"] == 24
    assert [note for note in reporter.notes if str(tmp_path / "store") in note and note.endswith(". It is built anew.")]
    assert build_index(config, SilentReporter())["kept"] == 24


def test_an_empty_folder_is_no_damaged_store(config_of: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert build_index(config_of(), SilentReporter())["encoded"] == 24


def test_the_command_tells_what_it_did(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["index", str(write_config()), f"rag_system.knowledge_store.path={tmp_path / 'store'}"]
    assert main([*arguments, "--quiet"]) == 0
    write_rows(tmp_path / "corpus.jsonl", [*ROWS[1:], {"id": "new", "text": "new"}])
    capsys.readouterr()
    assert main(arguments) == 0
    shown = [line.split() for line in capsys.readouterr().err.splitlines()]
    for line in (["passages", "24"], ["encoded", "1"], ["kept", "23"], ["removed", "1"], ["resumed", "0"]):
        assert line in shown
    assert main([*arguments, "--rebuild", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["passages"], told["encoded"], told["kept"], told["removed"]) == (24, 24, 0, 0)
    assert main([*arguments, "--rebuild", "--to", str(tmp_path / "config.yaml"), "--json"]) == 2
    assert "--rebuild" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_what_is_kept_is_found_by_id_and_then_by_text() -> None:
    old = [KnowledgeNode("a", "one"), KnowledgeNode("b", "same"), KnowledgeNode("c", "same"), KnowledgeNode("d", "x")]
    new = [KnowledgeNode("c", "same"), KnowledgeNode("e", "one"), KnowledgeNode("d", "y"), KnowledgeNode("b", "same")]
    changes = find_changes(old, new, reusable=True)
    assert changes.reused == {0: 2, 1: 0, 3: 1}
    assert (changes.encoded, changes.written, changes.removed) == ([2], [1, 2], ["a"])
    assert not changes.keeps_order
    assert find_changes(old, new, reusable=False).encoded == [0, 1, 2, 3]
    grown = find_changes(old, [*old, KnowledgeNode("e", "e")], reusable=True)
    assert grown.only_appends
    assert (grown.written, grown.encoded) == ([4], [4])
    assert not find_changes(old, [*old[1:], KnowledgeNode("e", "e")], reusable=True).only_appends
    assert not find_changes(old, [KnowledgeNode("a", "other"), *old[1:]], reusable=True).only_appends


# Going on


KILLED = """
import os, signal, sys
from fedrag_cli.cli.main import main
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever as Retriever

embed, batches = Retriever.embed, []


def killed_in_the_third_batch(self, encoder, features):
    batches.append(len(features["input_ids"]))
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, encoder, features)


Retriever.embed = killed_in_the_third_batch
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Return a function that runs `fedrag index` until a signal in the third batch, and returns the exit code."""

    def stopped(*arguments: str, number: signal.Signals = signal.SIGINT) -> int:
        embed, batches = SentenceTransformerRetriever.embed, []

        def stopped_in_the_third_batch(self: SentenceTransformerRetriever, *inputs: Any) -> torch.Tensor:
            batches.append(inputs)
            if len(batches) == 3:
                os.kill(os.getpid(), number)
            return embed(self, *inputs)

        with monkeypatch.context() as patched:
            patched.setattr(SentenceTransformerRetriever, "embed", stopped_in_the_third_batch)
            return main(["index", str(tmp_path / "config.yaml"), *arguments])

    return stopped


def test_a_killed_build_goes_on_and_gives_the_same_bits(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path
) -> None:
    build_index(config_of("undisturbed"), SilentReporter())
    config = config_of()
    encoded.clear()
    command = [sys.executable, "-c", KILLED, "index", str(tmp_path / "config.yaml")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / ".store.partial").exists()
    assert not (tmp_path / "store").exists()
    reporter = Notes()
    told = build_index(config, reporter)
    assert (told["encoded"], told["resumed"], told["kept"]) == (16, 8, 0)
    assert encoded == [4, 4, 4, 4]
    assert any("8 passages are encoded" in note for note in reporter.notes)
    assert not (tmp_path / ".store.partial").exists()
    assert_equal_stores(config, config_of("undisturbed"), 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_says_that_the_same_command_goes_on(
    config_of: Callable[..., Config],
    encoded: list[int],
    stop: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    config = config_of()
    assert stop(number=number) == 130
    shown = capsys.readouterr().err
    assert "8 of 24 passages are encoded" in shown
    assert "same command goes on" in shown
    encoded.clear()
    assert build_index(config, SilentReporter())["resumed"] == 8
    assert sum(encoded) == 16


@pytest.mark.parametrize("kind", ["memory", "faiss flat", "qdrant"])
def test_an_update_that_was_stopped_goes_on_and_the_old_store_stays_until_then(
    config_of: Callable[..., Config], encoded: list[int], stop: Callable[..., int], kind: str
) -> None:
    store, rows = STORES[kind], [*ROWS, *({"id": f"n{n}", "text": "the barn " * (n + 1)} for n in range(10))]
    build_index(config_of("undisturbed", store), SilentReporter())
    build_index(config_of("undisturbed", store, rows), SilentReporter())
    build_index(config_of("store", store), SilentReporter())
    config = config_of("store", store, rows)
    assert stop() == 130
    assert len(opened(config)) == 24
    encoded.clear()
    told = build_index(config, SilentReporter())
    assert (told["encoded"], told["resumed"], told["kept"], sum(encoded)) == (2, 8, 24, 2)
    assert_equal_stores(config, config_of("undisturbed", store, rows), 0)


def test_a_torn_end_is_dropped_and_the_rest_is_kept(
    config_of: Callable[..., Config], stop: Callable[..., int], tmp_path: Path
) -> None:
    build_index(config_of("undisturbed"), SilentReporter())
    config, file = config_of(), tmp_path / ".store.partial"
    stop()
    content = file.read_bytes()
    chunk = 12 + 4 * (16 + 32 * 4) + 16
    for damaged, left in (
        (content, 8),
        (content[:-5], 4),
        (content[:-chunk], 4),
        (content + b"partial", 8),
        (content + content[-chunk:-1], 8),
        (content[: -chunk // 2] + b"?" + content[-chunk // 2 + 1 :], 4),
        (content[: 12 - 2 * chunk] + b"?" + content[13 - 2 * chunk :], 0),
        (content[:20], 0),
        (b"\xff\n" + content, 0),
        (b"", 0),
    ):
        file.write_bytes(damaged)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        told = build_index(config, SilentReporter())
        assert (told["resumed"], told["encoded"]) == (left, 24 - left)
        assert_equal_stores(config, config_of("undisturbed"), 0)


def test_what_another_encoder_has_encoded_is_discarded(
    config_of: Callable[..., Config], stop: Callable[..., int], tmp_path: Path
) -> None:
    config_of()
    stop()
    reporter = Notes()
    told = build_index(config_of(passage_prompt="passage: "), reporter)
    assert (told["resumed"], told["encoded"]) == (0, 24)
    assert any("is of another encoder and is discarded" in note for note in reporter.notes)
    assert not (tmp_path / ".store.partial").exists()


def test_a_changed_corpus_goes_on_with_what_is_still_in_it(
    config_of: Callable[..., Config], encoded: list[int], stop: Callable[..., int]
) -> None:
    config_of()
    stop()
    encoded.clear()
    longest = sorted(ROWS, key=lambda row: -len(row["text"]))
    rows = [{**longest[0], "text": "something else"}, *longest[2:]]
    told = build_index(config_of(rows=rows), SilentReporter())
    assert (told["resumed"], told["encoded"], sum(encoded)) == (6, 17, 17)
    build_index(config_of("fresh", rows=rows), SilentReporter())
    assert_equal_stores(config_of(rows=rows), config_of("fresh", rows=rows), TOLERANCE)


def test_a_rebuild_goes_on_only_with_what_a_rebuild_has_encoded(
    config_of: Callable[..., Config], stop: Callable[..., int]
) -> None:
    config = config_of()
    stop()
    reporter = Notes()
    assert build_index(config, reporter, rebuild=True)["resumed"] == 0
    assert any("does not belong to a rebuild" in note for note in reporter.notes)
    stop("--rebuild")
    assert build_index(config, SilentReporter(), rebuild=True)["resumed"] == 8


@pytest.mark.parametrize("rebuild", [True, False])
def test_an_interrupted_rebuild_goes_on_as_one(
    config_of: Callable[..., Config], encoded: list[int], stop: Callable[..., int], tmp_path: Path, rebuild: bool
) -> None:
    config = config_of()
    build_index(config, SilentReporter())
    store = opened(config)
    store.replace_embeddings(store.embeddings.flip(0))
    store.save(tmp_path / "store")
    (tmp_path / "store" / "nodes.jsonl").write_text("damaged")
    assert stop("--rebuild") == 130
    encoded.clear()
    reporter = Notes()
    told = build_index(config, reporter, rebuild=rebuild)
    assert (told["resumed"], told["encoded"], told["kept"], sum(encoded)) == (8, 16, 0, 16)
    assert any("Going on with the rebuild" in note for note in reporter.notes) == (not rebuild)
    build_index(config_of("fresh"), SilentReporter())
    assert_equal_stores(config, config_of("fresh"), 0)


def test_a_rebuild_that_has_encoded_nothing_is_forgotten(
    config_of: Callable[..., Config], encoded: list[int], stop: Callable[..., int], tmp_path: Path
) -> None:
    config = config_of()
    build_index(config, SilentReporter())
    assert stop("--rebuild") == 130
    file = tmp_path / ".store.partial"
    file.write_bytes(file.read_bytes().partition(b"\n")[0] + b"\n")
    encoded.clear()
    assert (build_index(config, SilentReporter())["kept"], encoded) == (24, [])


def test_a_full_disk_loses_nothing(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(config_of(rows=ROWS[:4]), SilentReporter())
    config, write_all, chunks = config_of(rows=ROWS), partial_index_module._write_all, []

    def full_in_the_fourth(file: Any, content: bytes) -> None:
        chunks.append(content)
        if len(chunks) == 4:
            write_all(file, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file, content)

    monkeypatch.setattr(partial_index_module, "_write_all", full_in_the_fourth)
    with pytest.raises(FedRAGError, match=r"store: the disk is full") as caught:
        build_index(config, SilentReporter())
    assert caught.value.hint
    assert len(opened(config)) == 4
    encoded.clear()
    told = build_index(config, SilentReporter())
    assert (told["encoded"], told["resumed"], told["kept"], sum(encoded)) == (12, 8, 4, 12)


def test_a_disk_that_is_full_when_the_store_is_written_loses_no_embedding(
    config_of: Callable[..., Config], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedrag_cli.rag.knowledge_stores import memory

    config = config_of()

    def full(*_: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "write_embeddings", full)
        with pytest.raises(FedRAGError, match="the disk is full"):
            build_index(config, SilentReporter())
    encoded.clear()
    assert (build_index(config, SilentReporter())["resumed"], encoded) == (24, [])


def test_two_builds_of_one_place_do_not_mix(config_of: Callable[..., Config], tmp_path: Path) -> None:
    config = config_of()
    reporter, seen = SilentReporter(), []

    @contextmanager
    def task(*_: Any) -> Any:
        with pytest.raises(KnowledgeStoreError, match="Another process is building"):
            build_index(config, SilentReporter())
        seen.append(True)
        yield lambda done: None

    reporter.task = task  # type: ignore[method-assign]
    assert build_index(config, reporter)["encoded"] == 24
    assert seen


@pytest.mark.parametrize("when", ["opened", "locked"])
def test_a_build_whose_file_another_has_removed_meanwhile_locks_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, flock, calls = tmp_path / ".store.partial", fcntl.flock, []

    def with_another_that_ends(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1 and when == "opened":
            path.unlink()
        flock(file, how)
        if len(calls) == 1 and when == "locked":
            path.unlink()
            path.touch()

    monkeypatch.setattr(fcntl, "flock", with_another_that_ends)
    with partial_file(path, "store"):
        assert len(calls) == 2
        with pytest.raises(KnowledgeStoreError, match="Another process is building"), partial_file(path, "store"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_old_store_is_read_by_one_build_at_a_time(
    config_of: Callable[..., Config], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another build writes after it was read would be lost."""
    build_index(config_of(), SilentReporter())
    config, open_previous, seen = config_of(), indexing.open_previous, []

    def opened(*arguments: Any, **settings: Any) -> Any:
        found = open_previous(*arguments, **settings)
        if not seen:
            seen.append(True)
            with pytest.raises(KnowledgeStoreError, match="Another process is building"):
                build_index(config, SilentReporter())
        return found

    monkeypatch.setattr(indexing, "open_previous", opened)
    assert build_index(config, SilentReporter())["kept"] == 24
    assert seen


def test_folders_that_were_made_for_nothing_are_removed(config_of: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    config = config_of("there/deep/deeper/store", rows=[])
    with pytest.raises(FedRAGError, match="corpus"):
        build_index(config, SilentReporter())
    assert list((tmp_path / "there").iterdir()) == []


def test_an_interruption_before_the_first_batch_leaves_nothing(
    config_of: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SentenceTransformerRetriever, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        build_index(config_of(), SilentReporter())
    assert not isinstance(caught.value, RunInterruptedError)
    assert not (tmp_path / ".store.partial").exists()


# Places


@pytest.mark.parametrize("reader", ["index", "query", "move"])
def test_a_store_that_a_kill_left_set_aside_is_found(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path, reader: str
) -> None:
    config = config_of()
    build_index(config, SilentReporter())
    (tmp_path / "store").rename(tmp_path / ".store.old.tmp")
    encoded.clear()
    if reader == "index":
        assert build_index(config, SilentReporter())["kept"] == 24
    elif reader == "query":
        build_rag_system(config, with_generator=False)
    else:
        other = tmp_path / "other.yaml"
        other.write_text("extends: config.yaml\nrag_system: {knowledge_store: {path: other}}\n")
        assert main(["index", str(tmp_path / "config.yaml"), "--to", str(other), "--quiet"]) == 0
        assert (tmp_path / "other").exists()
    assert not encoded
    assert (tmp_path / "store").is_dir()
    assert not (tmp_path / ".store.old.tmp").exists()


def test_a_server_out_of_reach_is_told_before_anything_is_encoded(
    write_config: WriteConfig, encoded: list[int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://127.0.0.1:9"}})
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    for more in ([], ["--rebuild"]):
        assert main(["index", str(config), *more, "--json"]) == 4
        message = json.loads(capsys.readouterr().out)["error"]["message"]
        assert "cannot be reached: Connection refused." in message
    assert not encoded
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a Qdrant in memory, which stands for any server."""
    from fedrag_cli.rag.knowledge_stores import qdrant_publishing, qdrant_store

    server = in_memory()
    for module in (qdrant_store, qdrant_publishing):
        monkeypatch.setattr(module, "connect", lambda _: server)
    return server


@pytest.mark.parametrize("rebuild", [True, False])
def test_a_collection_of_others_is_left_alone_before_anything_is_encoded(
    write_config: WriteConfig, encoded: list[int], server: Any, rebuild: bool
) -> None:
    from qdrant_client import models

    server.create_collection("fedrag", models.VectorParams(size=4, distance=models.Distance.DOT))
    config = load_config(write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://h:1"}}))
    with pytest.raises(KnowledgeStoreError, match="which fedrag did not write and leaves alone"):
        build_index(config, SilentReporter(), rebuild=rebuild)
    assert not encoded
    assert [found.name for found in server.get_collections().collections] == ["fedrag"]


def test_another_filter_alone_gets_its_index_on_the_server(
    write_config: WriteConfig, encoded: list[int], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str, str]] = []
    known: dict[str, Any] = {}
    look = server.get_collection

    def create(name: str, key: str, field_schema: Any) -> None:
        made.append((name, key, field_schema.value))
        known[key] = field_schema

    monkeypatch.setattr(server, "create_payload_index", create)
    monkeypatch.setattr(
        server, "get_collection", lambda name: look(name).model_copy(update={"payload_schema": dict(known)})
    )

    def indexed(**settings: Any) -> dict[str, Any]:
        store = {"type": "qdrant", "url": "http://h:1", **settings}
        return build_index(load_config(write_config(rag_system={"knowledge_store": store})), SilentReporter())

    indexed(filter={"title": "owl"})
    (collection,) = [found.name for found in server.get_collections().collections]
    assert made == [(collection, "metadata.title", "keyword")]
    encoded.clear()
    for _ in range(2):
        assert indexed(filter={"title": "cat", "year": 7, "old": True})["kept"] == 24
    assert indexed()["kept"] == 24
    assert made[1:] == [(collection, "metadata.year", "integer"), (collection, "metadata.old", "bool")]
    assert not encoded
    assert [found.name for found in server.get_collections().collections] == [collection]


def test_a_server_gets_a_new_collection_only_where_something_has_changed(
    write_config: WriteConfig, encoded: list[int], tmp_path: Path, server: Any
) -> None:
    config = load_config(write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://h:1"}}))
    assert build_index(config, SilentReporter())["encoded"] == 24
    names = [found.name for found in server.get_collections().collections]
    assert build_index(config, SilentReporter())["kept"] == 24
    assert [found.name for found in server.get_collections().collections] == names
    encoded.clear()
    write_rows(tmp_path / "corpus.jsonl", [{"id": "new", "text": "new"}, *ROWS[1:]])
    told = build_index(config, SilentReporter())
    assert (told["encoded"], told["kept"], told["removed"], sum(encoded)) == (1, 23, 1, 1)
    assert [node.id for node in opened(config).nodes] == ["new", *(row["id"] for row in ROWS[1:])]
    assert len(server.get_collections().collections) == 1
    assert not list((tmp_path / "runs").glob(".*"))


def test_what_a_model_tells_of_itself_is_told_once(write_config: WriteConfig, tmp_path: Path) -> None:
    model = SentenceTransformer(str(load_config(write_config()).rag_system.retriever.model), device="cpu")
    model.prompts = {"query": "ask: ", "document": "read: "}
    model.save(str(tmp_path / "instructed"), create_model_card=False)
    notes = Notes()
    overrides = [
        f"rag_system.retriever.model={tmp_path / 'instructed'}",
        f"rag_system.knowledge_store.path={tmp_path / 'told'}",
    ]
    build_index(load_config(write_config(), overrides), notes)
    assert sum("own prompts are used" in note for note in notes.notes) == 1
