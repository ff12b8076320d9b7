"""`fedrag index` encodes what is new, and ends with the store of a fresh build."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from indexing import ROWS, STORES, TOLERANCE, Notes, Rows, WriteConfig, assert_equal_stores, opened
from sentence_transformers import SentenceTransformer

from fedrag_cli.cli.main import main
from fedrag_cli.config import Config, load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.index_build import build_index, find_changes
from fedrag_cli.rag.index_convert import move_index
from fedrag_cli.runs.reporter import SilentReporter

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
    assert (changes.encoded, changes.removed) == ([2], 1)
    assert not changes.only_appends
    assert find_changes(old, new, reusable=False).encoded == [0, 1, 2, 3]
    grown = find_changes(old, [*old, KnowledgeNode("e", "e")], reusable=True)
    assert grown.only_appends
    assert grown.encoded == [4]
    assert not find_changes(old, [*old, KnowledgeNode("e", "e")], reusable=False).only_appends
    assert not find_changes(old, [*old[1:], KnowledgeNode("e", "e")], reusable=True).only_appends
    assert not find_changes(old, [KnowledgeNode("a", "other"), *old[1:]], reusable=True).only_appends


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
