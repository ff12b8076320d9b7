"""Exact search on torch, over embeddings held in memory or left in the saved file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult, check_new, check_search
from fedrag_cli.rag.knowledge_stores.exact_search import (
    HeldVectors,
    format_name,
    found_at_once,
    recall,
    sampled_positions,
    search_blocks,
)
from fedrag_cli.rag.knowledge_stores.journal import Change, Journal
from fedrag_cli.rag.knowledge_stores.store_files import (
    EMBEDDINGS_FILE,
    NODES_FILE,
    EmbeddingsFile,
    MappedStore,
    MappedVectors,
    Passages,
    damaged_store,
    no_store,
    read_nodes,
    read_one_state,
    write_embeddings,
    write_nodes,
)
from fedrag_cli.runs.files import replace_directory_atomically

FORMAT = "fedrag-memory-store-1"


class InMemoryKnowledgeStore(KnowledgeStore):
    """Passages in a list and embeddings in one tensor with room for more.

    With `memory_map` a saved store stays in its folder until it is changed.

    Args:
        device: Where the embeddings are kept and searched.
        config: Number format, and whether a saved store stays on disk.
    """

    def __init__(self, device: torch.device | str = "cpu", config: MemoryStoreConfig | None = None) -> None:
        """Start empty."""
        super().__init__(device)
        self.config = config or MemoryStoreConfig()
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.rounded_to = self._own_rounding
        self._held = HeldVectors(self.device, self.dtype)
        self._mapped: MappedStore | None = None
        self._journal: Journal | None = None
        self._recall: float | None = None

    @classmethod
    def from_config(cls, config: MemoryStoreConfig, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Load the saved store, or start an empty one where none is saved yet."""
        if config.path is not None and Path(config.path).exists():
            return cls.load(Path(config.path), config, device=device)
        return cls(device, config)

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._passages if self._mapped is None else self._mapped.passages)

    @property
    def nodes(self) -> list[KnowledgeNode]:
        """All passages, in the order of their positions; a copy."""
        return self.nodes_at(range(len(self))) if self._mapped is not None else super().nodes

    def nodes_at(self, positions: Sequence[int]) -> list[KnowledgeNode]:
        """Return the passages at positions that a search gave."""
        return super().nodes_at(positions) if self._mapped is None else self._mapped.passages.at(positions)

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""
        return self._vectors.dimension

    @property
    def embeddings(self) -> Tensor:
        """All embeddings in float32, of shape (passages, dimension); it may be a view, so do not write into it."""
        return self._vectors.rows.to(self.device, torch.float32)

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add or replace passages; see `KnowledgeStore.add`."""
        check_new(nodes, embeddings, self.dimension, self.dtype)
        if not nodes:
            return
        self._take_over()
        embeddings = embeddings.detach()
        replaced, fresh = self._passages.put(nodes)
        if replaced:
            self._held.put(list(replaced.values()), embeddings[list(replaced)])
        if fresh:
            self._held.extend(embeddings[fresh] if replaced else embeddings)
        self._recall = None
        if self._journal is not None:
            self._journal.note(len(self), put=[node.id for node in nodes])

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones; see `KnowledgeStore.replace_embeddings`."""
        check_new(self.nodes, embeddings, self.dimension, self.dtype)
        self._take_over()
        self._held.replace(embeddings.detach())
        self.rounded_to = self._own_rounding
        self._note_all()

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        if not ids:
            return 0
        self._take_over()
        gone = [id for id in dict.fromkeys(ids) if id in self._passages.positions]
        if gone:
            self._held.keep(self._passages.remove(gone))
            self._recall = None
            if self._journal is not None:
                self._journal.note(len(self), deleted=gone)
        return len(gone)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.encoder_fingerprint = self.corpus_fingerprint = None
        self._passages, self._mapped = Passages(), None
        self._held = HeldVectors(self.device, self.dtype)
        self.rounded_to = self._own_rounding
        self._note_all()

    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query, block by block; see `KnowledgeStore.search_positions`."""
        check_search(query_embeddings, top_k, len(self), self.dimension)
        return search_blocks(self._vectors, query_embeddings.detach().to(self.device, torch.float32), top_k)

    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""
        return self._vectors.at(positions).to(self.device, torch.float32)

    @property
    def changes_cheaply(self) -> bool:
        """Whether any change of a saved store costs less than writing it anew."""
        return True

    @property
    def is_worth_writing(self) -> bool:
        """Whether a journal has taken into memory what is to stay on disk."""
        return self.config.memory_map and self._mapped is None and len(self) > 0

    def measure_recall(self, embeddings: Tensor) -> None:
        """Compare searches with those over the embeddings before they were rounded, for `build_report`.

        Args:
            embeddings: float32 tensor of shape (passages, dimension), in the order of the passages.
        """
        if self.dtype == torch.float32 or len(self) < 2:
            return
        sample, wanted = sampled_positions(len(self)), found_at_once(len(self))
        queries = embeddings[sample.to(embeddings.device)].to(self.device)
        exact = search_blocks(HeldVectors.around(embeddings), queries, wanted)[1]
        self._recall = recall(sample, exact, self.search_positions(queries, wanted)[1])

    def build_report(self) -> dict[str, Any]:
        """Return a half-precision store's number format, and its recall@10 against float32 where that was measured."""
        report: dict[str, Any] = {} if self.dtype == torch.float32 else {"dtype": self.config.dtype}
        if self._recall is not None:
            report["recall@10"] = round(self._recall, 4)
        return report

    def save(self, directory: Path) -> None:
        """Write passages as JSON lines and embeddings as safetensors into a new directory that replaces the old."""
        metadata = {
            "format": FORMAT,
            "encoder": self.encoder_fingerprint or "",
            "corpus": self.corpus_fingerprint or "",
        }
        if self.rounded_to is not None and self.rounded_to != self._own_rounding:
            metadata["rounded"] = self.rounded_to
        with replace_directory_atomically(directory) as target:
            shape, blocks = (len(self), self.dimension), self._vectors.blocks(max(1, len(self)))
            write_embeddings(target / EMBEDDINGS_FILE, blocks, shape, self.dtype, metadata)
            if self._mapped is None:
                write_nodes(self._passages.nodes, target)
            else:
                self._mapped.passages.write(target / NODES_FILE)
        self._start_journal(directory)

    def save_changes(self, directory: Path) -> None:
        """Add what changed to the folder's journal, or write everything where that is quicker.

        With `memory_map` everything is written, because a journal cannot stay on disk.

        Raises:
            KnowledgeStoreError: Another process has changed the folder meanwhile.
        """
        fingerprints = (self.encoder_fingerprint, self.corpus_fingerprint)
        if self._journal is None or not self._journal.suffices(directory, len(self), fingerprints):
            self.save(directory)
            return
        pending = self._journal.pending(fingerprints)
        if pending is None:
            return
        deleted, put = pending
        positions = sorted(self._passages.positions[id] for id in put)
        self._journal.append(
            Change(
                deleted,
                self.nodes_at(positions),
                self._held.at(torch.tensor(positions, dtype=torch.long)),
                self.encoder_fingerprint,
                self.corpus_fingerprint,
            )
        )

    @classmethod
    def load(
        cls, directory: Path, config: MemoryStoreConfig | None = None, *, device: torch.device | str = "cpu"
    ) -> InMemoryKnowledgeStore:
        """Read a store that `save` wrote, and what `save_changes` added to it.

        Args:
            directory: Its folder.
            config: The settings; the number format has to be that of the folder, which is taken where there are none.
            device: Where the embeddings are kept and searched.

        Raises:
            KnowledgeStoreError: The directory holds no store, a damaged one, or one of another number format.
        """
        return read_one_state(directory, lambda: cls._load(directory, config, device))

    @classmethod
    def _load(
        cls, directory: Path, config: MemoryStoreConfig | None, device: torch.device | str
    ) -> InMemoryKnowledgeStore:
        try:
            file = EmbeddingsFile.open(directory / EMBEDDINGS_FILE)
            if file.metadata.get("format") != FORMAT:
                raise ValueError("it is of another format")
            saved_as = cast(Literal["float32", "float16", "bfloat16"], format_name(file.dtype))
            store = cls(device, config or MemoryStoreConfig(dtype=saved_as))
            if file.dtype != store.dtype:
                raise KnowledgeStoreError(
                    f"The knowledge store in '{directory}' was saved as {saved_as}, but the config says "
                    f"{store.config.dtype}.",
                    "Refresh it with 'fedrag index CONFIG', or convert it with --to.",
                )
            store._read(directory, file)
        except FileNotFoundError as error:
            raise no_store(directory, error) from error
        except (SafetensorError, ValueError, TypeError, OSError) as error:
            raise damaged_store(directory, error) from error
        return store

    @property
    def _own_rounding(self) -> str | None:
        return None if self.dtype == torch.float32 else self.config.dtype

    @property
    def _vectors(self) -> HeldVectors | MappedVectors:
        return self._held if self._mapped is None else self._mapped.vectors

    def _read(self, directory: Path, file: EmbeddingsFile) -> None:
        if self.config.memory_map and file.rows:
            self._mapped = MappedStore.open(directory, file)
            _require_pairs(len(self), file.rows)
        else:
            nodes = read_nodes(directory)
            _require_pairs(len(nodes), file.rows)
            for block in file.blocks():
                self._held.extend(block, file.rows)
            check_new(nodes, self._held.rows, 0, self.dtype)
            self._passages = Passages(nodes)
        self.encoder_fingerprint = file.metadata.get("encoder") or None
        self.corpus_fingerprint = file.metadata.get("corpus") or None
        self.rounded_to = file.metadata.get("rounded") or self._own_rounding
        self._replay(directory)

    def _replay(self, directory: Path) -> None:
        journal = Journal(directory, (self.encoder_fingerprint, self.corpus_fingerprint))
        change = journal.read(self.dtype)
        if change is not None:
            self.delete(change.deleted)
            if change.nodes:
                self.add(change.nodes, change.embeddings)
            self.encoder_fingerprint, self.corpus_fingerprint = change.encoder, change.corpus
        self._journal = None if self.config.memory_map else journal

    def _start_journal(self, directory: Path) -> None:
        fingerprints = (self.encoder_fingerprint, self.corpus_fingerprint)
        self._journal = None if self.config.memory_map else Journal(directory, fingerprints)

    def _note_all(self) -> None:
        self._recall = None
        if self._journal is not None:
            self._journal.note_all()

    def _take_over(self) -> None:
        """Go on in memory with a copy of what was left on disk."""
        if self._mapped is None:
            return
        mapped, nodes = self._mapped, self.nodes
        check_new(nodes, mapped.vectors.rows, 0, self.dtype)
        for block in mapped.vectors.blocks(len(nodes)):
            self._held.extend(block, len(nodes))
        self._passages, self._mapped = Passages(nodes), None


def _require_pairs(passages: int, embeddings: int) -> None:
    if passages != embeddings:
        raise ValueError(f"it has {passages} passages, but {embeddings} embeddings")
