"""`fedrag index` goes on where it was stopped, and two of them do not mix."""

from __future__ import annotations

import errno
import fcntl
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
from indexing import ROWS, STORES, TOLERANCE, Notes, assert_equal_stores, opened

from fedrag_cli.cli.main import main
from fedrag_cli.config import Config
from fedrag_cli.errors import FedRAGError, KnowledgeStoreError, RunInterruptedError
from fedrag_cli.rag import index_build as indexing
from fedrag_cli.rag import index_resume
from fedrag_cli.rag.index_build import build_index
from fedrag_cli.rag.index_resume import partial_index
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.runs.reporter import SilentReporter

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


@pytest.mark.slow
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


def test_what_cannot_be_read_is_encoded_again_and_the_rest_is_kept(
    config_of: Callable[..., Config], stop: Callable[..., int], tmp_path: Path
) -> None:
    build_index(config_of("undisturbed"), SilentReporter())
    config, folder = config_of(), tmp_path / ".store.partial"
    stop()
    first, second = sorted(folder.glob("*.safetensors"))
    content, whole = {path: path.read_bytes() for path in (first, second)}, second.read_bytes()
    for damaged, left in (
        ({}, 8),
        ({second: whole[:-5]}, 4),
        ({first: b""}, 4),
        ({second: b"\xff" * len(whole)}, 4),
        ({second: whole.replace(b"fedrag-partial-index-2", b"fedrag-partial-index-1")}, 4),
        ({first: b"?", second: b"?"}, 0),
        ({folder / "0.safetensors": b"of another", folder / "x.safetensors.tmp": whole}, 8),
    ):
        folder.mkdir(exist_ok=True)
        for path, changed in {**content, **damaged}.items():
            path.write_bytes(changed)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        told = build_index(config, SilentReporter())
        assert (told["resumed"], told["encoded"]) == (left, 24 - left)
        assert_equal_stores(config, config_of("undisturbed"), 0)
        assert not folder.exists()


def test_a_batch_after_a_damaged_one_does_not_replace_another(
    config_of: Callable[..., Config], stop: Callable[..., int], tmp_path: Path
) -> None:
    config_of()
    stop()
    folder = tmp_path / ".store.partial"
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"?")
    # Two more batches, of which the first is that which was damaged or another.
    assert stop() == 130
    with partial_index(folder, tmp_path / "store", SilentReporter()) as partial:
        assert len(partial) == 12


def test_what_an_earlier_version_has_encoded_is_discarded_with_a_note(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    config, reporter = config_of(), Notes()
    (tmp_path / ".store.partial").write_bytes(b'{"format": "fedrag-partial-index-1"}\npart')
    told = build_index(config, reporter)
    assert (told["resumed"], told["encoded"]) == (0, 24)
    assert any("earlier version" in note and "discarded" in note for note in reporter.notes)
    assert not (tmp_path / ".store.partial").exists()


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
    for file in (tmp_path / ".store.partial").glob("*.safetensors"):
        file.unlink()
    encoded.clear()
    assert (build_index(config, SilentReporter())["kept"], encoded) == (24, [])


def test_a_full_disk_loses_nothing(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(config_of(rows=ROWS[:4]), SilentReporter())
    config, save_file, batches = config_of(rows=ROWS), index_resume.save_file, []

    def full_in_the_third(tensors: Any, path: Path, about: Any) -> None:
        batches.append(tensors)
        save_file(tensors, path, about)
        if len(batches) == 3:
            path.write_bytes(path.read_bytes()[:-9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index_resume, "save_file", full_in_the_third)
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
    from fedrag_cli.rag.knowledge_stores import base

    config = config_of()

    def full(*_: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(base, "write_embeddings", full)
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
    folder, place, flock, calls = tmp_path / ".store.partial", tmp_path / "store", fcntl.flock, []

    def with_another_that_ends(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1 and when == "opened":
            shutil.rmtree(folder)
        flock(file, how)
        if len(calls) == 1 and when == "locked":
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / index_resume.LOCK_FILE).touch()

    monkeypatch.setattr(fcntl, "flock", with_another_that_ends)
    with partial_index(folder, place, SilentReporter()):
        assert len(calls) == 2
        with (
            pytest.raises(KnowledgeStoreError, match="Another process is building"),
            partial_index(folder, place, SilentReporter()),
        ):
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
