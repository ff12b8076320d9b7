"""Reading the folder of a store that another process may replace meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.runs.atomic import restore_interrupted

_ATTEMPTS = 5

T = TypeVar("T")


def read_one_state(directory: Path, read: Callable[[], T]) -> T:
    """Read a folder so that all its files are of the same writing.

    Each file is opened by its path, so that one of the old folder could meet one of the new, which would pair passages
    with the embeddings of others.

    Args:
        directory: The folder.
        read: Reads it, and raises KnowledgeStoreError where something does not fit.

    Raises:
        KnowledgeStoreError: What `read` raises for a folder that stayed the same, or the folder never did.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(directory)
        try:
            result = read()
        except KnowledgeStoreError:
            if _identity(directory) == before and not restore_interrupted(directory):
                raise
            continue
        if _identity(directory) == before:
            return result
    raise KnowledgeStoreError(
        f"The knowledge store in '{directory}' was replaced again and again while it was being read.",
        "Wait for the process that writes it, and run the command again.",
    )


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """Return what tells one writing of a folder from all others; None where it is gone."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
