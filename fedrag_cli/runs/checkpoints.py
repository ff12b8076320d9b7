"""Checkpoints that are known to be whole: each carries a list of its files with their hashes, written last."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from fedrag_cli.errors import ModelError
from fedrag_cli.runs.files import write_json_atomically

MARKER = "complete.json"
PREFIX = "checkpoint-"


def mark_complete(directory: Path) -> None:
    """Write the list of a checkpoint's files, which says that all of them are there."""
    files = {
        str(file.relative_to(directory)): _hash(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    write_json_atomically(directory / MARKER, {"files": files})


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint, and remove those that a kill left half-written.

    Args:
        directory: Where the `checkpoint-STEP` folders are; it may be missing.

    Raises:
        ModelError: The newest checkpoint was whole once and is damaged now.
    """
    found = [path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True):
        if (path / MARKER).is_file():
            check_whole(path)
            return path
        shutil.rmtree(path)
    return None


def check_whole(directory: Path) -> None:
    """Raise ModelError where a file of a checkpoint is missing or differs from what was written."""
    hint = f"Remove the folder '{directory}' to go on from the checkpoint before it."
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The checkpoint '{directory}' is damaged: {MARKER} cannot be read ({error}).", hint
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
