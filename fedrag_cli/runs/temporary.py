"""Temporary files and directories beside what they become, and what kills leave of them.

A temporary directory is locked by the process that fills or removes it, so that one without a lock was left behind.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from pathlib import Path

LEFTOVER = re.compile(r"\.(?P<target>.+)\.(?P<kind>[0-9a-f]{8}|old)\.tmp")


def lock(file: IOBase) -> None:
    """Lock an open file for this process until it is closed.

    Raises:
        BlockingIOError: Another process has locked it.
    """
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
    """Make a temporary directory for a target and hold it.

    Args:
        path: The target; its parent is there.

    Yields:
        The directory, empty.
    """
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
    """Remove what was set aside, under a name by which nobody gives back to the target what is half removed.

    Args:
        set_aside: It may be missing.
        path: The target.
    """
    doomed = temporary_name(path)
    with _held(set_aside):
        try:
            set_aside.rename(doomed)
        except FileNotFoundError:
            return
        remove(doomed)


@contextmanager
def _held(directory: Path, *, waits: bool = False) -> Iterator[bool]:
    """Lock a directory; yield whether that was possible, which it is not everywhere.

    Args:
        directory: It may be missing, or be no directory.
        waits: Whether to wait for another process that holds it.
    """
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
