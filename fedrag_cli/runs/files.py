"""Writes files and directories so that a kill leaves the old or the new, never half; and checkpoints, which say so."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any

from fedrag_cli.errors import FedRAGError, ModelError

CHECKPOINT_PREFIX = "checkpoint-"
CHECKPOINT_MARKER = "complete.json"
LEFTOVER = re.compile(r"\.(?P<target>.+)\.(?P<kind>[0-9a-f]{8}|old)\.tmp")
_ATTEMPTS = 5
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}
# What torch's archive writer says where fewer bytes arrived than it wrote; it has no word of the system's reason.
_TORCH_WROTE_TOO_LITTLE = "unexpected pos"


def lock(file: IOBase) -> None:
    """Lock an open file for this process until it is closed; raise BlockingIOError where another one has locked it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def temporary_name(path: Path) -> Path:
    """Return a new name beside a target."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def name_aside(path: Path) -> Path:
    """Return the name that a target gets while another takes its place."""
    return path.with_name(f".{path.name}.old.tmp")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make an empty temporary directory beside a target and hold it."""
    while True:
        temporary = temporary_name(path)
        temporary.mkdir()
        with _held(temporary, waits=True):
            # Whoever removes leftovers may have taken it for one before it was locked.
            if temporary.exists():
                yield temporary
                return


def remove_abandoned(path: Path) -> None:
    """Remove the temporary directories of a target that no process holds any more."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        match = LEFTOVER.fullmatch(leftover.name)
        # What is set aside may be all that is left of the target.
        if match is None or match["target"] != path.name or match["kind"] == "old":
            continue
        with _held(leftover) as is_held:
            if is_held:
                # One that cannot be removed, for instance of another user, is no reason to stop.
                shutil.rmtree(leftover, ignore_errors=True)


def discard(set_aside: Path, path: Path) -> None:
    """Remove what was set aside, under a name by which nobody gives back to the target what is half removed."""
    doomed = temporary_name(path)
    with _held(set_aside):
        try:
            set_aside.rename(doomed)
        except FileNotFoundError:
            return
        remove(doomed)


@contextmanager
def _held(directory: Path, *, waits: bool = False) -> Iterator[bool]:
    """Lock a directory that may be missing; yield whether that was possible, which it is not everywhere."""
    # Windows can lock no directory.
    if os.name == "nt":
        yield False
        return
    import fcntl

    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


@contextmanager
def os_errors(path: Path | str) -> Iterator[None]:
    """Turn errors of the operating system, and others that tell of a full disk, into FedRAGErrors that name a path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DISK_FULL:
            raise _disk_full(path, reason) from error
        if error.errno in _NO_PERMISSION:
            raise FedRAGError(
                f"Cannot write {path}: {reason}.",
                "Check who owns the folder and whether it is mounted read-only, or choose another folder.",
            ) from error
        where = f" ({error.filename})" if error.filename is not None and str(error.filename) != str(path) else ""
        raise FedRAGError(
            f"Cannot write {path}: {reason}{where}.", "Check that the folder exists and that its disk works."
        ) from error
    except FedRAGError:
        raise
    except Exception as error:
        # Libraries that write by themselves raise errors of their own, which carry the system's words.
        reason = os.strerror(errno.ENOSPC)
        if reason in str(error) or _TORCH_WROTE_TOO_LITTLE in str(error):
            raise _disk_full(path, reason) from error
        raise


def write_bytes_atomically(path: Path | str, content: bytes) -> None:
    """Write a file, and missing folders above it: afterwards it holds the whole new content, or still the old one.

    Where it is a link, what it leads to is written.
    """
    path = Path(path)
    with os_errors(path):
        if path.exists() and not path.is_file():
            # A device or a pipe is written to, never replaced, and a folder refuses.
            with path.open("wb") as file:
                file.write(content)
            return
        with replace_file_atomically(path) as temporary, temporary.open("xb") as file:
            file.write(content)


@contextmanager
def replace_file_atomically(path: Path) -> Iterator[Path]:
    """Yield a path whose file, once made and closed, takes the place of another, or of what that one links to."""
    with os_errors(path):
        path = Path(os.path.realpath(path))
        temporary = temporary_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def require_writable(path: Path) -> None:
    """Make sure, before long work, that its result can be written to a file; raise FedRAGError where it cannot."""
    with os_errors(path):
        if path.exists() and not path.is_file():
            path.open("wb").close()
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file, as `write_bytes_atomically` does."""
    # Texts of data sets hold lone surrogates now and then, which UTF-8 cannot; their escape is valid JSON as well.
    write_bytes_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def write_json_atomically(path: Path | str, value: Any) -> None:
    """Write a JSON file, indented; raise FedRAGError where a number is not finite."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise FedRAGError(
            f"Cannot write {path}: {error}.", "JSON has no NaN and no infinity; find where the number comes from."
        ) from error
    write_text_atomically(path, text + "\n")


@contextmanager
def replace_directory_atomically(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary directory that takes the place of another when all went well.

    The old directory is set aside by one rename and the new one takes its name by a second. A kill between the two
    leaves the old one set aside; `restore_interrupted` and `remove_leftovers` put it back. What kills left of earlier
    replacements of the same directory is removed.
    """
    path = Path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with new_directory(path) as temporary:
            try:
                yield temporary
                _sync_tree(temporary)
                _put_in_place(temporary, path)
            except BaseException:
                # The first error is the one to report; what cannot be removed now is a recognisable leftover.
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def restore_interrupted(path: Path | str) -> bool:
    """Give a directory its name back that a kill has left set aside; return whether it had been."""
    path = Path(path)
    set_aside = name_aside(path)
    if os.path.lexists(path) or not set_aside.is_dir():
        return False
    with os_errors(path):
        try:
            set_aside.rename(path)
        except OSError as error:
            # Another process has done so meanwhile, or has put the new one there.
            if error.errno == errno.ENOENT or error.errno in _NOT_EMPTY:
                return False
            raise
        sync_directory(path.parent)
    return True


def remove_leftovers(directory: Path | str) -> list[Path]:
    """Remove what interrupted writes left in a directory and below it, where no other process is writing.

    An old directory that was set aside and never replaced gets its name back.
    """
    removed = []
    with os_errors(directory):
        for leftover in sorted(Path(directory).rglob(".*.tmp")):
            match = LEFTOVER.fullmatch(leftover.name)
            # One leftover directory may hold another, which went with it.
            if match is None or not os.path.lexists(leftover):
                continue
            target = leftover.with_name(match["target"])
            if match["kind"] == "old" and not target.exists():
                leftover.rename(target)
            else:
                remove(leftover)
                removed.append(leftover)
    return removed


def _put_in_place(temporary: Path, path: Path) -> None:
    set_aside = name_aside(path)
    for attempt in range(_ATTEMPTS):
        if path.is_dir():
            discard(set_aside, path)
            path.rename(set_aside)
        try:
            temporary.rename(path)
            break
        except OSError as error:
            # A reader that took this for an interrupted replacement has put the old one back: set it aside once more.
            if error.errno in _NOT_EMPTY and path.is_dir() and attempt + 1 < _ATTEMPTS:
                continue
            if set_aside.is_dir() and not path.exists():
                set_aside.rename(path)
            raise
    sync_directory(path.parent)
    discard(set_aside, path)


def _disk_full(path: Path | str, reason: str) -> FedRAGError:
    return FedRAGError(
        f"Cannot write {path}: the disk is full ({reason}).",
        "Free some space or choose a folder on another disk; what was saved before is intact.",
    )


def _sync_tree(directory: Path) -> None:
    for entry in directory.rglob("*"):
        if entry.is_dir():
            sync_directory(entry)
        elif entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Bring a directory's own list of names to the disk, after a file in it was made or renamed."""
    # Windows cannot open a directory, and its files and renames need no such call.
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file, and remove from its end what a kill cut off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()


def append_line(path: Path, record: Any) -> None:
    """Append one record as JSON, and return when it is on the disk."""
    with path.open("ab") as file:
        # Lone surrogates, which UTF-8 cannot hold, become the escapes that JSON has for them.
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def mark_complete(directory: Path) -> None:
    """Write the list of a checkpoint's files with their hashes, which says that all of them are there."""
    files = {
        str(file.relative_to(directory)): _hash(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != CHECKPOINT_MARKER
    }
    write_json_atomically(directory / CHECKPOINT_MARKER, {"files": files})


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole of the checkpoints in a directory, and remove those that a kill left half-written.

    Raises:
        ModelError: The newest checkpoint was whole once and is damaged now.
    """
    names = (path.name.removeprefix(CHECKPOINT_PREFIX) for path in directory.glob(f"{CHECKPOINT_PREFIX}*"))
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        path = directory / f"{CHECKPOINT_PREFIX}{step}"
        if (path / CHECKPOINT_MARKER).is_file():
            _check_whole(path)
            return path
        shutil.rmtree(path)
    return None


def _check_whole(directory: Path) -> None:
    """Raise ModelError where a file of a checkpoint is missing or differs from what was written."""
    hint = f"Remove the folder '{directory}' to go on from the checkpoint before it."
    try:
        files = json.loads((directory / CHECKPOINT_MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The checkpoint '{directory}' is damaged: {CHECKPOINT_MARKER} cannot be read ({error}).", hint
        ) from error
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise ModelError(f"The checkpoint '{directory}' is damaged: {name} is missing.", hint)
        if _hash(file) != expected:
            raise ModelError(f"The checkpoint '{directory}' is damaged: {name} differs from what was saved.", hint)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
