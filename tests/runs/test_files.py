"""Files and directories are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.errors import FedRAGError
from fedrag_cli.runs import files as temporary
from fedrag_cli.runs.files import (
    lock,
    os_errors,
    remove_abandoned,
    remove_leftovers,
    replace_directory_atomically,
    require_writable,
    restore_interrupted,
    write_bytes_atomically,
    write_json_atomically,
    write_text_atomically,
)


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for it" / "text.md"
    write_text_atomically(path, "old")
    write_text_atomically(path, "neu: äöü\n")
    assert path.read_text(encoding="utf-8") == "neu: äöü\n"
    assert list(path.parent.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    value = {"z": 1, "a": [1.5, None, True, "Köln"]}
    write_json_atomically(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "z": 1,\n  "a"')
    assert "Köln" in text
    assert json.loads(text) == value


def test_json_holds_what_utf8_cannot(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "a.json", {"answer": "half \ud83d of a pair"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"answer": "half \ud83d of a pair"}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite(tmp_path: Path, number: float) -> None:
    path = tmp_path / "a.json"
    write_json_atomically(path, {"loss": 1.0})
    with pytest.raises(FedRAGError, match=r"a\.json"):
        write_json_atomically(path, {"loss": number})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_a_target_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken" / "file").mkdir(parents=True)
    with pytest.raises(FedRAGError, match="Cannot write"):
        write_text_atomically(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("folder", ["", ".", "/"])
def test_a_folder_as_the_target_is_an_error(folder: str) -> None:
    with pytest.raises(FedRAGError, match="Is a directory"):
        write_text_atomically(folder, "text")
    with pytest.raises(FedRAGError, match="Is a directory"):
        require_writable(Path(folder))


def test_a_pipe_is_written_to_and_a_link_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "link").symlink_to("pipe")
    write_text_atomically(tmp_path / "link", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "new").symlink_to("file")
    write_text_atomically(tmp_path / "new", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert (tmp_path / "new").is_symlink()


def test_what_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new" / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert list((tmp_path / "new").iterdir()) == []
    for path in (tmp_path / "file" / "inside", tmp_path / ("a" * 256)):
        with pytest.raises(FedRAGError, match="Cannot write"):
            require_writable(path)


def test_a_directory_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "retriever"
    for content in ("old", "new"):
        with replace_directory_atomically(target) as directory:
            assert directory.parent == tmp_path
            assert directory.name.startswith(".")
            assert directory.name.endswith(".tmp")
            (directory / "weights").mkdir()
            (directory / "weights" / content).write_text(content)
            assert not (target / "weights" / content).exists()
        assert [entry.name for entry in (target / "weights").iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "retriever"
    target.mkdir()
    (target / "old").write_text("old")

    def fail_halfway() -> None:
        with replace_directory_atomically(target) as directory:
            (directory / "new").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert [entry.name for entry in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_a_directory_is_replaced_but_not_its_target(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    target = tmp_path / "retriever"
    target.symlink_to(elsewhere)
    with replace_directory_atomically(target) as directory:
        (directory / "new").write_text("new")
    assert (target / "new").exists()
    assert (elsewhere / "kept").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "retriever"]


def test_a_file_in_the_way_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "retriever").write_text("a file")
    with pytest.raises(FedRAGError, match="Cannot write"), replace_directory_atomically(tmp_path / "retriever"):
        pass
    assert (tmp_path / "retriever").read_text() == "a file"
    assert len(list(tmp_path.iterdir())) == 1


def _run_until_killed(program: str, target: Path) -> None:
    """Run a program that gets the target as its argument and kills itself."""
    finished = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert finished.returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_kill_leaves_the_old_directory_and_a_recognisable_leftover(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("old")
    program = (
        "import os, signal, sys\n"
        "from fedrag_cli.runs.files import replace_directory_atomically\n"
        "with replace_directory_atomically(sys.argv[1]) as directory:\n"
        "    (directory / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    _run_until_killed(program, target)
    assert [entry.name for entry in target.iterdir()] == ["old"]
    removed = remove_leftovers(tmp_path)
    assert len(removed) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_kill_between_the_two_renames_set_aside_gets_its_name_back(tmp_path: Path) -> None:
    target = tmp_path / "store"
    target.mkdir()
    (target / "old").write_text("old")
    program = (
        "import os, pathlib, signal, sys\n"
        "from fedrag_cli.runs.files import replace_directory_atomically\n"
        "rename = pathlib.Path.rename\n"
        "def killed_after_the_first(self, to):\n"
        "    rename(self, to)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with replace_directory_atomically(sys.argv[1]) as directory:\n"
        "    (directory / 'new').write_text('new')\n"
        "    pathlib.Path.rename = killed_after_the_first\n"
    )
    _run_until_killed(program, target)
    assert not target.exists()
    assert restore_interrupted(target)
    assert [entry.name for entry in target.iterdir()] == ["old"]
    assert not restore_interrupted(target)
    assert not restore_interrupted(tmp_path / "never there")


def test_a_directory_that_is_there_is_not_restored_over(tmp_path: Path) -> None:
    for name in ("store", ".store.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert not restore_interrupted(tmp_path / "store")
    assert (tmp_path / "store" / "store").exists()


def test_a_reader_that_restores_between_the_two_renames_does_not_stop_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    target.mkdir()
    (target / "old").touch()
    rename, restored = Path.rename, []

    def with_a_reader(self: Path, to: Path) -> Path:
        moved = rename(self, to)
        if self == target and not restored:
            restored.append(restore_interrupted(target))
        return moved

    with replace_directory_atomically(target) as directory:
        (directory / "new").touch()
        monkeypatch.setattr(Path, "rename", with_a_reader)
    assert restored == [True]
    assert [entry.name for entry in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


KILLED_WHILE_FILLING = """
import os, signal, sys
from fedrag_cli.runs.files import replace_directory_atomically
with replace_directory_atomically(sys.argv[1]) as directory:
    (directory / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_is_removed_and_what_others_still_fill_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a[1]" / "store"
    for _ in range(3):
        _run_until_killed(KILLED_WHILE_FILLING, target)
    _run_until_killed(KILLED_WHILE_FILLING, target.with_name("store.other"))
    (target.with_name(".store.01234567.tmp")).write_text("a file")
    # Each has removed what the one before it left.
    assert len(list(target.parent.iterdir())) == 3
    with replace_directory_atomically(target) as one:
        (one / "one").touch()
        with replace_directory_atomically(target) as two:
            (two / "two").touch()
        assert [entry.name for entry in target.iterdir()] == ["two"]
        assert (one / "one").exists()
    assert [entry.name for entry in target.iterdir()] == ["one"]
    left = {re.sub("[0-9a-f]{8}", "?", entry.name) for entry in target.parent.iterdir()}
    assert left == {"store", ".store.other.?.tmp", ".store.?.tmp"}
    assert target.with_name(".store.01234567.tmp").is_file()


def test_a_new_directory_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = Path.mkdir, []

    def with_a_cleaner(self: Path, *arguments: Any, **settings: Any) -> None:
        mkdir(self, *arguments, **settings)
        if self.name.endswith(".tmp"):
            made.append(self)
            if len(made) < 3:
                remove_abandoned(tmp_path / "store")

    monkeypatch.setattr(Path, "mkdir", with_a_cleaner)
    with replace_directory_atomically(tmp_path / "store") as directory:
        (directory / "new").touch()
    assert len(made) == 3
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == ["new"]


def test_what_is_half_removed_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "store"
    _filled(target, "old")
    monkeypatch.setattr(temporary, "remove", _removes_half)
    with pytest.raises(KeyboardInterrupt):
        _filled(target, "new")
    assert sorted(entry.name for entry in target.iterdir()) == ["new0", "new1"]
    shutil.rmtree(target)
    assert not restore_interrupted(target)
    assert not target.exists()
    monkeypatch.undo()
    with replace_directory_atomically(target):
        assert len(list(tmp_path.iterdir())) == 1


def _filled(target: Path, name: str) -> None:
    with replace_directory_atomically(target) as directory:
        for number in range(2):
            (directory / f"{name}{number}").touch()


def _removes_half(path: Path) -> None:
    next(path.iterdir()).unlink()
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT])
def test_what_another_has_restored_or_replaced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / ".store.old.tmp").mkdir()

    def already(self: Path, to: Path) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "rename", already)
    assert not restore_interrupted(tmp_path / "store")


def test_leftovers_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    kept = [tmp_path / ".hidden.tmp", tmp_path / "a.json", tmp_path / "b.0123abcd.tmp"]
    leftovers = [tmp_path / ".a.json.0123abcd.tmp", tmp_path / "plots" / ".loss.png.89abcdef.tmp"]
    (tmp_path / "plots").mkdir()
    for path in kept + leftovers:
        path.write_text("x")
    directory = tmp_path / ".retriever.00000000.tmp"
    directory.mkdir()
    (directory / ".inner.00000000.tmp").write_text("x")
    assert remove_leftovers(tmp_path) == sorted([*leftovers, directory])
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in [*leftovers, directory])


def test_a_directory_that_was_set_aside_comes_back_when_it_was_not_replaced(tmp_path: Path) -> None:
    (tmp_path / ".retriever.old.tmp").mkdir()
    (tmp_path / ".retriever.old.tmp" / "weights").write_text("old")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / "retriever" / "weights").read_text() == "old"

    (tmp_path / ".retriever.old.tmp").mkdir()
    assert remove_leftovers(tmp_path) == [tmp_path / ".retriever.old.tmp"]
    assert (tmp_path / "retriever" / "weights").read_text() == "old"


def test_no_directory_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_errors_of_the_system_say_what_to_do(number: int, message: str) -> None:
    with pytest.raises(FedRAGError, match=message) as caught, os_errors("runs/summary.json"):
        raise OSError(number, os.strerror(number))
    assert "runs/summary.json" in caught.value.message
    assert "[Errno" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk() -> None:
    with pytest.raises(FedRAGError, match="the disk is full"), os_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"text")


def test_a_full_disk_that_a_library_met(tmp_path: Path) -> None:
    """safetensors and FAISS write by themselves, and raise errors of their own."""
    with (
        pytest.raises(FedRAGError, match=r"store: the disk is full"),
        replace_directory_atomically(tmp_path / "store"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), os_errors("path"):
        raise KeyError("name")


def test_a_lock_is_portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    with path.open("wb") as first, path.open("wb") as second:
        lock(first)
        with pytest.raises(BlockingIOError):
            lock(second)
    with path.open("wb") as third:
        lock(third)

    class Windows:
        LK_NBLCK = 2
        taken: list[int] = []

        @classmethod
        def locking(cls, descriptor: int, mode: int, size: int) -> None:
            assert (mode, size) == (2, 1)
            if cls.taken:
                raise OSError(errno.EACCES, "Permission denied")
            cls.taken.append(descriptor)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", Windows)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fcntl", None)  # type: ignore[arg-type]
    with path.open("wb") as first, path.open("wb") as second:
        lock(first)
        with pytest.raises(BlockingIOError):
            lock(second)
