"""Where the server keeps the objects of messages: small ones in memory, pieces of tensors in files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedrag_cli.runs.atomic import os_errors

# Flower cuts tensors into pieces of 5 MiB; what is smaller than this are records, or small tensors.
SMALLEST_FILE = 64 * 2**10


class PieceStore(InMemoryObjectStore):
    """An object store whose memory does not grow with what clients send.

    It registers an object tree in one step: objects are addressed by content, and Flower 1.41 registers a tree node by
    node, so deleting one client's reply could remove an array that another client, whose reply holds the same array,
    is registering at that moment.

    Args:
        directory: Folder of the files, for this store alone.
    """

    def __init__(self, directory: Path) -> None:
        """Keep the folder; nothing is written yet."""
        super().__init__()
        self.directory = directory
        self._in_files: set[str] = set()
        self._failure: OSError | None = None

    def open(self) -> None:
        """Make the folder anew, without what a killed process has left in it."""
        with os_errors(self.directory):
            self.close()
            self.directory.mkdir(mode=0o700, parents=True)

    def close(self) -> None:
        """Remove the folder."""
        with os_errors(self.directory):
            if self.directory.exists():
                shutil.rmtree(self.directory)

    def raise_failure(self) -> None:
        """Raise FedRAGError where a piece could not be written; the client was told only that it is not stored."""
        if self._failure is not None:
            with os_errors(self.directory):
                raise self._failure

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Register a tree while nobody else changes the store."""
        with self.lock_store:
            return super().preregister(run_id, object_tree)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Put an object into the store; raises ValueError where its name is not the hash of its content."""
        super().put(object_id, object_content)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or len(entry.content) < SMALLEST_FILE:
                return
            self._write(object_id, entry.content)
            self._in_files.add(object_id)
            entry.content = b""

    def get(self, object_id: str) -> bytes | None:
        """Return an object; empty bytes where it is announced only, None where it is unknown."""
        with self.lock_store:
            if object_id in self._in_files:
                return (self.directory / object_id).read_bytes()
            return super().get(object_id)

    def has(self, object_id: str) -> bool:
        """Return whether an object is there, without reading it."""
        with self.lock_store:
            entry = self.store.get(object_id)
            return entry is not None and entry.is_available

    def delete(self, object_id: str) -> None:
        """Delete an object, and what belongs to no other; Flower calls this for each of them."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store and object_id in self._in_files:
                self._in_files.remove(object_id)
                (self.directory / object_id).unlink()

    def clear(self) -> None:
        """Delete everything."""
        with self.lock_store:
            super().clear()
            for object_id in self._in_files:
                (self.directory / object_id).unlink()
            self._in_files.clear()

    def _write(self, object_id: str, content: bytes) -> None:
        try:
            # The id is the hash of the content, so it is a safe name.
            descriptor = os.open(self.directory / object_id, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            self._failure = error
            raise
