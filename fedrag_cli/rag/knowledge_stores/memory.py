"""Exact search on torch, over embeddings held in memory or left in the saved file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import OLD_CHANGES_FILE, MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult, check_new, check_search, require_pairs
from fedrag_cli.rag.knowledge_stores.exact_search import HeldVectors, format_name, measured_recall, search_blocks
from fedrag_cli.rag.knowledge_stores.store_files import (
    EmbeddingsFile,
    MappedStore,
    MappedVectors,
    Passages,
    read_nodes,
    store_errors,
)


class InMemoryKnowledgeStore(KnowledgeStore):
    """Passages in a list and embeddings in one tensor with room for more.

    With `memory_map` a saved store stays in its folder until it is changed.

    Args:
        config: Number format, and whether a saved store stays on disk.
        device: Where the embeddings are kept and searched.
    """

    def __init__(self, config: MemoryStoreConfig | None = None, device: torch.device | str = "cpu") -> None:
        """Start empty."""
        self.config: MemoryStoreConfig
        super().__init__(config or MemoryStoreConfig(), device)
        self.dtype = getattr(torch, self.config.dtype)
        self.rounded_to = self._own_rounding
        self._held = HeldVectors(self.device, self.dtype)
        self._mapped: MappedStore | None = None
        self._recall: float | None = None

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

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones; see `KnowledgeStore.replace_embeddings`."""
        check_new(self.nodes, embeddings, self.dimension, self.dtype)
        self._take_over()
        self._held.replace(embeddings.detach())
        self.rounded_to, self._recall = self._own_rounding, None

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        if not ids:
            return 0
        self._take_over()
        old = len(self)
        kept = self._passages.remove(ids)
        if len(kept) < old:
            self._held.keep(kept)
            self._recall = None
        return old - len(kept)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.encoder_fingerprint = self.corpus_fingerprint = None
        self._passages, self._mapped = Passages(), None
        self._held = HeldVectors(self.device, self.dtype)
        self.rounded_to, self._recall = self._own_rounding, None

    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query, block by block; see `KnowledgeStore.search_positions`."""
        check_search(query_embeddings, top_k, len(self), self.dimension)
        return search_blocks(self._vectors, query_embeddings.detach().to(self.device, torch.float32), top_k)

    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""
        return self._vectors.at(positions).to(self.device, torch.float32)

    def filled_from(self, source: KnowledgeStore) -> KnowledgeStore:
        """Return this store, which is empty, with the passages of another; or that one, where it is just like it."""
        if isinstance(source, InMemoryKnowledgeStore) and source.dtype == self.dtype:
            return source
        return super().filled_from(source)

    def measure_recall(self, embeddings: Tensor) -> None:
        """Compare searches with those over the embeddings before they were rounded, for `build_report`."""
        if self.dtype == torch.float32 or len(self) < 2:
            return
        rounded_from = HeldVectors.around(embeddings)
        self._recall = measured_recall(
            lambda sample: rounded_from.at(sample).to(self.device), rounded_from, self.search_positions, len(self)
        )

    def build_report(self) -> dict[str, Any]:
        """Return a half-precision store's number format, and its recall@10 against float32 where that was measured."""
        report: dict[str, Any] = {} if self.dtype == torch.float32 else {"dtype": self.config.dtype}
        if self._recall is not None:
            report["recall@10"] = round(self._recall, 4)
        return report

    @classmethod
    def load(cls, directory: Path, config: Any = None, *, device: torch.device | str = "cpu") -> Self:
        """Read a store that `save` wrote; without settings, in the number format that it was saved in."""
        return super().load(directory, config or MemoryStoreConfig(path=str(directory)).as_built(), device=device)

    @property
    def _own_rounding(self) -> str | None:
        return None if self.dtype == torch.float32 else self.config.dtype

    @property
    def _vectors(self) -> HeldVectors | MappedVectors:
        return self._held if self._mapped is None else self._mapped.vectors

    def _write_nodes(self, directory: Path) -> list[int]:
        return super()._write_nodes(directory) if self._mapped is None else self._mapped.passages.write(directory)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all embeddings in their order and number format, at most `rows` at once."""
        return self._vectors.blocks(rows)

    def _read(self, directory: Path, file: EmbeddingsFile) -> None:
        if file.dtype != self.dtype:
            raise KnowledgeStoreError(
                f"The knowledge store in '{directory}' was saved as {format_name(file.dtype)}, but the config says "
                f"{self.config.dtype}.",
                "Refresh it with 'fedrag index CONFIG', or convert it with --to.",
            )
        if (directory / OLD_CHANGES_FILE).exists():
            # These passages are older than the corpus that the changes, which are not read any more, brought here.
            self.corpus_fingerprint = None
        with store_errors(directory):
            if self.config.memory_map and file.rows:
                self._mapped = MappedStore.open(directory, file)
                require_pairs(len(self), file.rows)
                return
            nodes = read_nodes(directory)
            require_pairs(len(nodes), file.rows)
            for block in file.blocks():
                self._held.extend(block, file.rows)
        check_new(nodes, self._held.rows, 0, self.dtype)
        self._passages = Passages(nodes)

    def _take_over(self) -> None:
        """Go on in memory with a copy of what was left on disk."""
        if self._mapped is None:
            return
        mapped, nodes = self._mapped, self.nodes
        check_new(nodes, mapped.vectors.rows, 0, self.dtype)
        for block in mapped.vectors.blocks(len(nodes)):
            self._held.extend(block, len(nodes))
        self._passages, self._mapped = Passages(nodes), None
