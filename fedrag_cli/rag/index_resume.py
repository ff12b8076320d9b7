"""What an unfinished `fedrag index` has encoded already, in a file that only grows.

The file begins with a line of JSON that names the encoder. A chunk follows for each batch: how many passages, their
keys, their embeddings, and a checksum over all this. What a kill or a full disk leaves of a chunk is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.runs.files import lock, os_errors
from fedrag_cli.runs.reporter import Reporter

FORMAT = "fedrag-partial-index-1"
_CHUNK = struct.Struct("<4sII")
_MARK = b"part"
_DIGEST_BYTES = 16


class PartialIndex:
    """Embeddings of passages by what the passages are.

    Args:
        file: The file, open for reading and appending without a buffer, behind its first line.
        place: What errors of writing name.
        is_rebuild: Whether all passages are to be encoded, whatever a store holds.
    """

    def __init__(self, file: FileIO, place: Path | str, *, is_rebuild: bool) -> None:
        """Read the chunks that are whole, and cut off the rest."""
        self._file, self._place, self.is_rebuild = file, place, is_rebuild
        self._parts: list[Tensor] = []
        self._place_of: dict[bytes, tuple[int, int]] = {}
        end = file.tell()
        while chunk := _read_chunk(file):
            self._take(*chunk)
            end = file.tell()
        file.truncate(end)

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._place_of)

    def __contains__(self, node: KnowledgeNode) -> bool:
        """Return whether a passage is encoded already."""
        return _key(node) in self._place_of

    def copy_embeddings(self, nodes: Mapping[int, KnowledgeNode], target: Tensor) -> None:
        """Copy the embeddings of passages.

        Args:
            nodes: The passages by the rows of `target` that are theirs.
            target: float32 tensor of shape (any, dimension) on the CPU.
        """
        rows_of_part: dict[int, list[tuple[int, int]]] = {}
        for row, node in nodes.items():
            number, position = self._place_of[_key(node)]
            rows_of_part.setdefault(number, []).append((row, position))
        for number, pairs in rows_of_part.items():
            target[[row for row, _ in pairs]] = self._parts[number][[position for _, position in pairs]]

    def append(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Write the embeddings of a batch; when this returns, a kill no longer loses them.

        Args:
            nodes: The passages.
            embeddings: float32 tensor of shape (len(nodes), dimension), on the CPU.

        Raises:
            FedRAGError: The disk is full, or the file cannot be written.
        """
        keys = [_key(node) for node in nodes]
        content = _CHUNK.pack(_MARK, *embeddings.shape) + b"".join(keys) + embeddings.contiguous().numpy().tobytes()
        with os_errors(self._place):
            _write_all(self._file, content + _digest(content))
        self._take(keys, embeddings)

    def _take(self, keys: Sequence[bytes], embeddings: Tensor) -> None:
        number = len(self._parts)
        self._parts.append(embeddings)
        self._place_of.update((key, (number, position)) for position, key in enumerate(keys))


class PartialFile:
    """The locked file of a partial index, of which nothing has been read yet.

    Args:
        file: The file, open for reading and appending without a buffer.
        place: What errors of writing name.
    """

    def __init__(self, file: FileIO, place: Path | str) -> None:
        """Keep the file for `begin`."""
        self._file, self._place = file, place
        self._begun: PartialIndex | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no passage is lost with the file."""
        return not (self._size if self._begun is None else len(self._begun))

    @property
    def holds_rebuild(self) -> bool:
        """Whether a rebuild was interrupted that has begun the file."""
        about, end = self._beginning()
        return bool(about.get("rebuild")) and self._size > end

    @property
    def _size(self) -> int:
        return Path(self._file.name).stat().st_size

    def begin(self, encoder: str, reporter: Reporter, *, rebuild: bool) -> PartialIndex:
        """Read what is encoded already, or start anew.

        A rebuild that was interrupted stays one; a rebuild takes over only what another one has encoded.

        Args:
            encoder: The fingerprint of the encoder; what another one has encoded is discarded.
            reporter: Told what is discarded.
            rebuild: Whether a rebuild is asked for.

        Raises:
            FedRAGError: The file cannot be written.
        """
        with os_errors(self._place):
            about, _ = self._beginning()
            is_rebuild = bool(about.get("rebuild"))
            fits = about.get("format") == FORMAT and about.get("encoder") == encoder and (is_rebuild or not rebuild)
            found = PartialIndex(self._file, self._place, is_rebuild=is_rebuild) if fits else None
            if found is None or (not len(found) and is_rebuild != rebuild):
                if about and not fits:
                    why = "is of another encoder" if about.get("encoder") != encoder else "does not belong to a rebuild"
                    reporter.note(f"What an unfinished index has encoded {why} and is discarded.")
                found = self._started_anew(encoder, rebuild=rebuild)
            self._begun = found
        return found

    def _beginning(self) -> tuple[dict[str, object], int]:
        """Return what the first line says, and where it ends; the file is left there."""
        self._file.seek(0)
        line = self._file.readline()
        try:
            about = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            about = {}
        return about if isinstance(about, dict) else {}, len(line)

    def _started_anew(self, encoder: str, *, rebuild: bool) -> PartialIndex:
        self._file.truncate(0)
        self._file.seek(0)
        about = {"format": FORMAT, "encoder": encoder, "rebuild": rebuild}
        _write_all(self._file, json.dumps(about).encode() + b"\n")
        return PartialIndex(self._file, self._place, is_rebuild=rebuild)


@contextmanager
def partial_file(path: Path, place: Path | str) -> Iterator[PartialFile]:
    """Lock the file of a place's partial index; it is removed when the enclosed code has ended well.

    Args:
        path: The file; missing parent folders are made, and removed again where nothing came of it.
        place: What errors of writing name.

    Yields:
        The file; no other process can have it meanwhile.

    Raises:
        FedRAGError: It cannot be written.
        KnowledgeStoreError: Another process has it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    with os_errors(place):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path, place)
    with file:
        partial = PartialFile(file, place)
        try:
            yield partial
        except BaseException:
            if partial.is_empty:
                path.unlink(missing_ok=True)
                _remove_empty(made)
            raise
        with os_errors(place):
            path.unlink(missing_ok=True)


def _open_locked(path: Path, place: Path | str) -> FileIO:
    while True:
        file = FileIO(path, "a+")
        try:
            lock(file)
        except BlockingIOError as error:
            file.close()
            raise KnowledgeStoreError(
                f"Another process is building the knowledge store for {place}.", "Wait for it or stop it."
            ) from error
        # A build that ended between the two calls has removed the file, and the next would lock another one.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _read_chunk(file: FileIO) -> tuple[list[bytes], Tensor] | None:
    head = file.read(_CHUNK.size)
    if len(head) < _CHUNK.size:
        return None
    mark, count, dimension = _CHUNK.unpack(head)
    size = count * (_DIGEST_BYTES + 4 * dimension)
    if mark != _MARK or size > Path(file.name).stat().st_size:
        return None
    body, digest = _read_all(file, size), file.read(_DIGEST_BYTES)
    if digest != _digest(head + body):
        return None
    keys = [body[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES] for row in range(count)]
    numbers = np.frombuffer(body, dtype="<f4", offset=count * _DIGEST_BYTES)
    return keys, torch.from_numpy(numbers.reshape(count, dimension).copy())


def _read_all(file: FileIO, size: int) -> bytes:
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_all(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _key(node: KnowledgeNode) -> bytes:
    # Texts of data sets hold lone surrogates now and then.
    return _digest(json.dumps([node.id, node.text]).encode())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
