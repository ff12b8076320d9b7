"""What has changed since a store's folder was written, in a file of the folder that only ever gets longer.

Each line is one change, with a checksum. A kill while one is being written leaves a last line without an end, which is
dropped: the change was not kept yet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.store_files import EMBEDDINGS_FILE, JOURNAL_FILE, raw_bytes
from fedrag_cli.runs.files import os_errors, sync_directory

# With more changes than this part of the passages, writing everything is worth it.
_PART = 8
_HEAD, _TAIL = '{"checksum": "', '", "change": '


@dataclass(frozen=True)
class Change:
    """What one state of a store has that the one before had not, and the other way round.

    Args:
        deleted: Ids of passages that go, first of all.
        nodes: Passages that are added, or take the place of those with their ids.
        embeddings: Theirs, of shape (len(nodes), dimension), in the store's number format.
        encoder: The new state's fingerprint of the encoder.
        corpus: The new state's fingerprint of the corpus.
    """

    deleted: list[str]
    nodes: list[KnowledgeNode]
    embeddings: Tensor
    encoder: str | None
    corpus: str | None


class Journal:
    """Notes what changes in a store that was read from a folder or saved to it, and keeps the notes there.

    Args:
        directory: The folder, as it was just read or written.
        fingerprints: Those of encoder and corpus in it.
    """

    def __init__(self, directory: Path, fingerprints: tuple[str | None, str | None]) -> None:
        """Start with no change."""
        self._directory = directory.resolve()
        self._written_as = _identity(self._directory)
        self._size = self._end = _size(self._path)
        self._fingerprints = fingerprints
        self._kept = 0
        self._all_changed = False
        self._put: dict[str, None] = {}
        self._deleted: dict[str, None] = {}

    def read(self, dtype: torch.dtype) -> Change | None:
        """Return all that the folder's notes say as one change; None where there are none.

        Args:
            dtype: The number format of the store.

        Raises:
            ValueError: A line is damaged.
            OSError: The file cannot be read.
        """
        changes = list(self._read_lines(dtype))
        if not changes:
            return None
        deleted: dict[str, None] = {}
        put: dict[str, tuple[KnowledgeNode, Tensor]] = {}
        for change in changes:
            for id in change.deleted:
                put.pop(id, None)
                deleted[id] = None
            put.update((node.id, (node, row)) for node, row in zip(change.nodes, change.embeddings, strict=True))
        self._kept = sum(map(_weight, changes))
        self._fingerprints = changes[-1].encoder, changes[-1].corpus
        embeddings = torch.stack([row for _, row in put.values()]) if put else torch.zeros((0, 0), dtype=dtype)
        return Change(list(deleted), [node for node, _ in put.values()], embeddings, *self._fingerprints)

    def note(self, passages: int, *, put: Sequence[str] = (), deleted: Sequence[str] = ()) -> None:
        """Note which passages were added or replaced, or deleted, in a store that now has so many."""
        for id in deleted:
            self._put.pop(id, None)
        self._deleted.update(dict.fromkeys(deleted))
        self._put.update(dict.fromkeys(put))
        if len(self._put) + len(self._deleted) > passages // _PART:
            self.note_all()

    def note_all(self) -> None:
        """Note that everything has changed."""
        self._all_changed = True
        self._put, self._deleted = {}, {}

    def suffices(self, directory: Path, passages: int, fingerprints: tuple[str | None, str | None]) -> bool:
        """Whether adding to the notes in a folder keeps a store of so many passages, and is quicker than writing it."""
        if self._all_changed or directory.resolve() != self._directory or not self._directory.exists():
            return False
        changed = len(self._put) + len(self._deleted) or int(fingerprints != self._fingerprints)
        return not changed or (self._kept + changed) * _PART <= passages

    def pending(self, fingerprints: tuple[str | None, str | None]) -> tuple[list[str], list[str]] | None:
        """Return the ids of passages that were deleted, and of those put since; None where the folder has it all."""
        if not self._put and not self._deleted and fingerprints == self._fingerprints:
            return None
        return list(self._deleted), list(self._put)

    def append(self, change: Change) -> None:
        """Bring a change to the disk; it is what `pending` told.

        Raises:
            KnowledgeStoreError: Another process has changed the folder meanwhile.
            FedRAGError: The file cannot be written.
        """
        if _identity(self._directory) != self._written_as or _size(self._path) != self._size:
            raise KnowledgeStoreError(
                f"The knowledge store in '{self._directory}' was changed by another process.", "Run the command again."
            )
        line, is_new = _to_line(change), not self._path.exists()
        with os_errors(self._path):
            try:
                with self._path.open("ab") as file:
                    # A line that a kill cut off must not run into this one.
                    file.truncate(self._end)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                if is_new:
                    sync_directory(self._directory)
            finally:
                self._size = _size(self._path)
        self._end = self._size
        self._kept += _weight(change)
        self._fingerprints = change.encoder, change.corpus
        self._put, self._deleted = {}, {}

    @property
    def _path(self) -> Path:
        return self._directory / JOURNAL_FILE

    def _read_lines(self, dtype: torch.dtype) -> Iterator[Change]:
        self._end = 0
        if not self._path.exists():
            return
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                yield _from_line(line, dtype, number)
                self._end += len(line)


def _weight(change: Change) -> int:
    """Return how many changes a line counts for; one of other fingerprints alone has to be read as well."""
    return max(1, len(change.deleted) + len(change.nodes))


def _to_line(change: Change) -> bytes:
    content = {
        "deleted": change.deleted,
        "nodes": [{"id": node.id, "text": node.text, "metadata": node.metadata} for node in change.nodes],
        "embeddings": base64.b64encode(raw_bytes(change.embeddings)).decode(),
        "encoder": change.encoder,
        "corpus": change.corpus,
    }
    return _sealed(json.dumps(content))


def _from_line(line: bytes, dtype: torch.dtype, number: int) -> Change:
    damaged = f"line {number} of '{JOURNAL_FILE}' is not as it was written"
    try:
        text = line.decode("ascii")[len(_HEAD) + 16 + len(_TAIL) : -2]
        if _sealed(text) != line:
            raise ValueError(damaged)
        content: dict[str, Any] = json.loads(text)
        nodes = [KnowledgeNode(**row) for row in content["nodes"]]
        raw = bytearray(base64.b64decode(content["embeddings"]))
        embeddings = torch.frombuffer(raw, dtype=dtype).view(len(nodes), -1) if nodes else torch.zeros((0, 0))
        return Change(content["deleted"], nodes, embeddings, content["encoder"], content["corpus"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(damaged) from error


def _sealed(text: str) -> bytes:
    checksum = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{_HEAD}{checksum}{_TAIL}{text}}}\n".encode()


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """Return what tells one writing of a folder from all others; None where it is gone."""
    path = directory / EMBEDDINGS_FILE
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
