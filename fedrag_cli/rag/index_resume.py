"""What an unfinished `fedrag index` has encoded already, in a folder with a safetensors file for each batch.

Each file is written under another name and then renamed, so that a kill leaves all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.runs.files import discard, lock, os_errors
from fedrag_cli.runs.reporter import Reporter

FORMAT = "fedrag-partial-index-2"
LOCK_FILE = "lock"
_KEY_BYTES = 16


class PartialIndex:
    """Embeddings of passages by what the passages are; errors of writing name the place of the whole store."""

    def __init__(self, folder: Path, place: Path) -> None:
        """Read what is there; what cannot be read is encoded again."""
        self._folder, self._place = folder, place
        self._encoder: str | None = None
        self.is_rebuild = False
        """Whether all passages are to be encoded, whatever a store holds."""
        self._clear()
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as shard:
                    about = shard.metadata() or {}
                    if about.get("format") != FORMAT:
                        continue
                    keys, embeddings = shard.get_tensor("keys"), shard.get_tensor("embeddings")
            except (SafetensorError, OSError):
                continue
            self._encoder, self.is_rebuild = about["encoder"], about["rebuild"] == "yes"
            self._take([bytes(key) for key in keys.numpy()], embeddings)

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._place_of)

    def __contains__(self, node: KnowledgeNode) -> bool:
        """Return whether a passage is encoded already."""
        return _key(node) in self._place_of

    def begin(self, encoder: str, reporter: Reporter, *, rebuild: bool) -> None:
        """Go on with what is encoded already, or discard what is of another encoder or does not fit.

        A rebuild that was interrupted stays one; a rebuild takes over only what another one has encoded.
        """
        if len(self) and self._encoder == encoder and (self.is_rebuild or not rebuild):
            return
        if len(self):
            why = "is of another encoder" if self._encoder != encoder else "does not belong to a rebuild"
            reporter.note(f"What an unfinished index has encoded {why} and is discarded.")
        with os_errors(self._place):
            for file in self._folder.glob("*.safetensors*"):
                file.unlink()
        self._clear()
        self._encoder, self.is_rebuild = encoder, rebuild

    def append(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Write the embeddings of a batch, float32 on the CPU; when this returns, a kill no longer loses them."""
        keys = [_key(node) for node in nodes]
        # No passage is encoded twice, so that no other batch begins with this one.
        file = self._folder / f"{keys[0].hex()}.safetensors"
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, _KEY_BYTES),
            "embeddings": embeddings.contiguous(),
        }
        about = {"format": FORMAT, "encoder": self._encoder or "", "rebuild": "yes" if self.is_rebuild else "no"}
        with os_errors(self._place):
            temporary = file.with_name(f"{file.name}.tmp")
            save_file(tensors, temporary, about)
            temporary.replace(file)
        self._take(keys, embeddings)

    def copy_embeddings(self, nodes: Mapping[int, KnowledgeNode], target: Tensor) -> None:
        """Copy the embeddings of passages into the rows of a float32 tensor on the CPU that are theirs."""
        rows_of_part: dict[int, list[tuple[int, int]]] = {}
        for row, node in nodes.items():
            number, position = self._place_of[_key(node)]
            rows_of_part.setdefault(number, []).append((row, position))
        for number, pairs in rows_of_part.items():
            target[[row for row, _ in pairs]] = self._parts[number][[position for _, position in pairs]]

    def _clear(self) -> None:
        self._parts: list[Tensor] = []
        self._place_of: dict[bytes, tuple[int, int]] = {}

    def _take(self, keys: Sequence[bytes], embeddings: Tensor) -> None:
        self._place_of.update((key, (len(self._parts), position)) for position, key in enumerate(keys))
        self._parts.append(embeddings)


@contextmanager
def partial_index(folder: Path, place: Path, reporter: Reporter) -> Iterator[PartialIndex]:
    """Lock the folder of a place's partial index; it is removed when the enclosed code has ended well.

    Missing parents are made, and removed again where nothing came of it.

    Raises:
        FedRAGError: It cannot be written.
        KnowledgeStoreError: Another process has it.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    with os_errors(place):
        if folder.is_file():
            reporter.note(
                "What an earlier version of fedrag has encoded of an unfinished index is discarded; "
                "where it was a rebuild, --rebuild begins it anew."
            )
            folder.unlink()
        file = _open_locked(folder, place)
    with file:
        partial = PartialIndex(folder, place)
        try:
            yield partial
        except BaseException:
            if not len(partial):
                discard(folder, folder)
                _remove_empty(made)
            raise
        with os_errors(place):
            discard(folder, folder)


def _open_locked(folder: Path, place: Path) -> FileIO:
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = FileIO(path, "a+")
        except FileNotFoundError:
            # A build that ended has removed the folder since.
            continue
        try:
            lock(file)
        except BlockingIOError as error:
            file.close()
            raise KnowledgeStoreError(
                f"Another process is building the knowledge store for {place}.", "Wait for it or stop it."
            ) from error
        # The same may have happened before the file was locked, and the next build would lock another one.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _key(node: KnowledgeNode) -> bytes:
    # Texts of data sets hold lone surrogates now and then.
    return hashlib.blake2b(json.dumps([node.id, node.text]).encode(), digest_size=_KEY_BYTES).digest()
