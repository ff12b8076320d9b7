"""What the store in memory appends to its folder in the place of writing everything."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import nodes, numbered, vectors

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, FedRAGError, KnowledgeStoreError
from fedrag_cli.rag.config import MemoryStoreConfig
from fedrag_cli.rag.index_convert import require_place
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.knowledge_stores.store_files import EMBEDDINGS_FILE, JOURNAL_FILE

load = InMemoryKnowledgeStore.load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def saved(folder: Path, count: int = 100, **settings: Any) -> InMemoryKnowledgeStore:
    store = InMemoryKnowledgeStore(config=MemoryStoreConfig(**settings))
    store.add(numbered(count), vectors(count, 4))
    store.encoder_fingerprint, store.corpus_fingerprint = "encoder", "corpus 0"
    store.save(folder)
    return store


def lines(folder: Path) -> list[bytes]:
    path = folder / JOURNAL_FILE
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def assert_same(store: InMemoryKnowledgeStore, expected: InMemoryKnowledgeStore) -> None:
    assert store.nodes == expected.nodes
    assert torch.equal(store.embeddings, expected.embeddings)
    assert store.encoder_fingerprint == expected.encoder_fingerprint
    assert store.corpus_fingerprint == expected.corpus_fingerprint
    queries = vectors(3, 4, seed=77)
    assert torch.equal(store.search_positions(queries, 5)[1], expected.search_positions(queries, 5)[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_added_replaced_and_deleted_is_appended_and_read_again(folder: Path, dtype: str) -> None:
    store = saved(folder, dtype=dtype)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    odd = KnowledgeNode("ü\ud800", "one\ntwo\u2028\r", {"nested": {"list": [1, 2.5, None]}, "1": 1e300})
    steps = [
        lambda: store.add([odd, *nodes("p7")], 1e-3 * vectors(2, 4, seed=1)),
        lambda: store.delete(["p0", "p99", "ü\ud800"]),
        lambda: store.add([odd, *nodes("p0")], vectors(2, 4, seed=2)),
    ]
    for number, step in enumerate(steps, start=1):
        step()
        store.corpus_fingerprint = f"corpus {number}"
        store.save_changes(folder)
        assert len(lines(folder)) == number
        assert_same(load(folder), store)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert [node.id for node in load(folder).nodes[-2:]] == ["ü\ud800", "p0"]


def test_lines_of_fingerprints_alone_are_counted_too(folder: Path) -> None:
    store = saved(folder)
    counts = []
    for number in range(1, 30):
        store.corpus_fingerprint = f"corpus {number}"
        store.save_changes(folder)
        store.save_changes(folder)
        counts.append(len(lines(folder)))
        if number % 5 == 0:
            store = load(folder)
        assert load(folder).corpus_fingerprint == f"corpus {number}"
    # A hundred passages take twelve changes; the thirteenth writes the store.
    assert counts == [*range(1, 13), *range(13), *range(4)]


def test_a_small_store_that_did_not_change_is_not_written(folder: Path) -> None:
    store = saved(folder, 5)
    before = (folder / EMBEDDINGS_FILE).stat().st_ino
    store.save_changes(folder)
    assert (folder / EMBEDDINGS_FILE).stat().st_ino == before


def test_a_full_save_removes_the_journal(folder: Path) -> None:
    store = saved(folder)
    store.add(nodes("new"), torch.ones(1, 4))
    store.save_changes(folder)
    assert len(lines(folder)) == 1
    store.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([EMBEDDINGS_FILE, "nodes.jsonl"])
    assert_same(load(folder), store)
    store.save_changes(folder)
    assert not lines(folder)


def test_what_did_not_change_is_not_written_but_a_fingerprint_is(folder: Path) -> None:
    store = load(saved(folder) and folder)
    store.save_changes(folder)
    store.delete(["unknown"])
    store.add([], torch.zeros(0, 4))
    store.save_changes(folder)
    assert not lines(folder)
    store.corpus_fingerprint = "corpus 1"
    store.save_changes(folder)
    store.save_changes(folder)
    assert len(lines(folder)) == 1
    assert load(folder).corpus_fingerprint == "corpus 1"
    store.add(nodes("a"), torch.ones(1, 4))
    store.delete(["a"])
    store.save_changes(folder)
    assert_same(load(folder), store)


def test_several_changes_between_two_saves_are_kept_together_or_not_at_all(folder: Path) -> None:
    store = saved(folder)
    store.add(nodes("a"), torch.ones(1, 4))
    store.delete(["p3"])
    store.add(nodes("p4"), torch.zeros(1, 4))
    store.save_changes(folder)
    (line,) = lines(folder)
    assert_same(load(folder), store)
    (folder / JOURNAL_FILE).write_bytes(line[:-2])
    assert [node.id for node in load(folder).nodes] == [f"p{number}" for number in range(100)]


def test_many_appends_equal_a_full_save(folder: Path, tmp_path: Path) -> None:
    numbers, store = random.Random(5), saved(folder, 400)
    appended = 0
    for turn in range(60):
        ids = [f"p{number}" for number in numbers.sample(range(420), numbers.randint(1, 3))]
        if numbers.random() < 0.4:
            store.delete(ids)
        else:
            store.add(nodes(*ids), vectors(len(ids), 4, seed=turn + 10))
        store.corpus_fingerprint = f"corpus {turn}"
        before = len(lines(folder))
        store.save_changes(folder)
        appended += len(lines(folder)) == before + 1
        if numbers.random() < 0.2:
            store = load(folder)
    assert 30 < appended < 60
    store.save(tmp_path / "full")
    assert_same(load(folder), load(tmp_path / "full"))
    load(folder).save(tmp_path / "again")
    for name in (EMBEDDINGS_FILE, "nodes.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_more_than_an_eighth_is_written_as_a_whole(folder: Path) -> None:
    store = saved(folder)
    for number in range(14):
        store.add(nodes(f"new{number}"), torch.ones(1, 4))
        store.save_changes(folder)
    assert len(lines(folder)) == 14
    store.add(nodes("new14"), torch.ones(1, 4))
    store.save_changes(folder)
    assert not lines(folder)
    assert_same(load(folder), store)
    store.add(numbered(20, 500), torch.ones(20, 4))
    store.save_changes(folder)
    assert not lines(folder)
    assert_same(load(folder), store)


@pytest.mark.parametrize("change", ["replace", "clear", "elsewhere", "never saved"])
def test_where_everything_changed_everything_is_written(folder: Path, tmp_path: Path, change: str) -> None:
    store, place = saved(folder), folder
    if change == "replace":
        store.replace_embeddings(torch.zeros(100, 4))
    elif change == "clear":
        store.clear()
        store.add(numbered(30), torch.ones(30, 4))
    elif change == "elsewhere":
        store.add(nodes("new"), torch.ones(1, 4))
        place = tmp_path / "other"
    else:
        store = InMemoryKnowledgeStore()
        store.add(numbered(30), torch.ones(30, 4))
    store.save_changes(place)
    assert not lines(place)
    assert_same(load(place), store)


@pytest.mark.parametrize("left", [1, 20, 0.5, -2, -1])
def test_a_line_that_a_kill_cut_off_is_dropped_and_written_over(folder: Path, left: float) -> None:
    store = saved(folder)
    store.add(nodes("a"), torch.ones(1, 4))
    store.save_changes(folder)
    kept = load(folder)
    store.add(nodes("b"), torch.ones(1, 4))
    store.save_changes(folder)
    first, second = lines(folder)
    end = int(len(second) * left) if isinstance(left, float) else left
    (folder / JOURNAL_FILE).write_bytes(first + second[:end])
    again = load(folder)
    assert_same(again, kept)
    again.add(nodes("c"), torch.zeros(1, 4))
    again.save_changes(folder)
    assert len(lines(folder)) == 2
    assert_same(load(folder), again)


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("place", [3, 20, 60, -40])
def test_a_damaged_line_is_an_error(folder: Path, line: int, place: int) -> None:
    store = saved(folder)
    for id in ("a", "b"):
        store.add(nodes(id), torch.ones(1, 4))
        store.save_changes(folder)
    both = [bytearray(row) for row in lines(folder)]
    both[line][place] ^= 1
    (folder / JOURNAL_FILE).write_bytes(b"".join(both))
    with pytest.raises(KnowledgeStoreError, match=f"line {line + 1} of 'changes.jsonl'") as caught:
        load(folder)
    assert "fedrag index" in caught.value.hint


def test_a_line_that_is_cut_off_in_the_middle_is_an_error(folder: Path) -> None:
    store = saved(folder)
    for id in ("a", "b"):
        store.add(nodes(id), torch.ones(1, 4))
        store.save_changes(folder)
    first, second = lines(folder)
    for damaged in (first[:-30] + second, first[:-1] + second, first + b"\n" + second, b"\x00" * 30 + b"\n"):
        (folder / JOURNAL_FILE).write_bytes(damaged)
        with pytest.raises(KnowledgeStoreError, match="damaged"):
            load(folder)


@pytest.mark.parametrize("other", ["appended", "saved", "killed"])
def test_a_folder_that_another_process_changed_is_left_alone(folder: Path, other: str) -> None:
    saved(folder)
    mine, theirs = load(folder), load(folder)
    theirs.add(nodes("theirs"), torch.ones(1, 4))
    if other == "saved":
        theirs.save(folder)
    else:
        theirs.save_changes(folder)
    if other == "killed":
        (folder / JOURNAL_FILE).write_bytes(lines(folder)[0][:-9])
    mine.add(nodes("mine"), torch.ones(1, 4))
    before = lines(folder)
    with pytest.raises(KnowledgeStoreError, match="changed by another process"):
        mine.save_changes(folder)
    assert lines(folder) == before


def test_a_failure_while_appending_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(folder)
    store.add(nodes("a"), torch.ones(1, 4))

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(FedRAGError, match="disk is full"):
            store.save_changes(folder)
    store.save_changes(folder)
    assert len(lines(folder)) == 1
    assert_same(load(folder), store)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.knowledge_stores.store_files import EMBEDDINGS_FILE, JOURNAL_FILE

folder, moment = Path(sys.argv[1]), sys.argv[2]
store = InMemoryKnowledgeStore.load(folder)
store.add([KnowledgeNode("kept", "text")], torch.ones(1, 4))
store.save_changes(folder)
store.add([KnowledgeNode("killed", "text")], torch.ones(1, 4))
if moment == "synced":
    store.save_changes(folder)
elif moment == "syncing":
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    store.save_changes(folder)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["added", "syncing", "synced"])
def test_a_kill_leaves_the_old_or_the_new_store(folder: Path, moment: str) -> None:
    saved(folder)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False)
    assert done.returncode == -9
    ids = [node.id for node in load(folder).nodes]
    assert ids[:101] == [*(f"p{number}" for number in range(100)), "kept"]
    assert ids[101:] == ([] if moment == "added" else ["killed"])


def test_a_mapped_store_reads_a_journal_and_writes_everything(folder: Path) -> None:
    store = saved(folder)
    store.add(nodes("a"), torch.ones(1, 4))
    store.save_changes(folder)
    config = MemoryStoreConfig(path=str(folder), memory_map=True)
    mapped = load(folder, config)
    assert_same(mapped, store)
    mapped.add(nodes("b"), torch.ones(1, 4))
    mapped.save_changes(folder)
    assert not lines(folder)
    assert_same(load(folder, config), mapped)


def test_a_folder_with_a_journal_is_a_store_and_one_with_more_is_not(folder: Path) -> None:
    store = saved(folder)
    store.add(nodes("a"), torch.ones(1, 4))
    store.save_changes(folder)
    config = MemoryStoreConfig(path=str(folder))
    assert require_place(config) == str(folder)
    (folder / "mine.txt").touch()
    with pytest.raises(ConfigError, match="something other"):
        require_place(config)
