"""Exact search over embeddings held in memory, on torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult
from fedrag_cli.rag.knowledge_stores.checks import check_new, check_search
from fedrag_cli.rag.knowledge_stores.passages import Passages, read_nodes, write_nodes
from fedrag_cli.rag.knowledge_stores.ties import search_in_order
from fedrag_cli.runs.atomic import replace_directory_atomically

EMBEDDINGS_FILE = "embeddings.safetensors"
FORMAT = "fedrag-memory-store-1"


class InMemoryKnowledgeStore(KnowledgeStore):
    """Passages in a list and embeddings in one tensor that grows by doubling.

    Args:
        device: Where the embeddings are kept and searched.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start empty."""
        super().__init__(device)
        self._buffer = torch.zeros((0, 0), device=self.device)

    @classmethod
    def from_config(cls, config: MemoryStoreConfig, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Load the saved store, or start an empty one where none is saved yet."""
        if config.path is not None and Path(config.path).exists():
            return cls.load(Path(config.path), device=device)
        return cls(device)

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""
        return self._buffer.shape[1] if len(self) else 0

    @property
    def embeddings(self) -> Tensor:
        """All embeddings, of shape (passages, dimension); a view, so do not write into it."""
        return self._buffer[: len(self)]

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add or replace passages; see `KnowledgeStore.add`."""
        check_new(nodes, embeddings, self.dimension)
        if not nodes:
            return
        embeddings = embeddings.detach().to(self.device, torch.float32)
        old = len(self)
        self._reserve(old + sum(node.id not in self._passages.positions for node in nodes), embeddings.shape[1])
        replaced, fresh = self._passages.put(nodes)
        if replaced:
            self._buffer[list(replaced.values())] = embeddings[list(replaced)]
        self._buffer[old : len(self)] = embeddings[fresh]

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones; see `KnowledgeStore.replace_embeddings`."""
        check_new(self._passages.nodes, embeddings, self.dimension)
        self._buffer = embeddings.detach().to(self.device, torch.float32).clone()

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        old = len(self)
        kept = self._passages.remove(ids)
        if len(kept) < old:
            self._buffer = self._buffer[kept].clone()
        return old - len(kept)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.encoder_fingerprint = self.corpus_fingerprint = None
        self._passages = Passages()
        self._buffer = torch.zeros((0, 0), device=self.device)

    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query by one matrix product; see `KnowledgeStore.search_positions`."""
        check_search(query_embeddings, top_k, len(self), self.dimension)
        queries = query_embeddings.detach().to(self.device, torch.float32)

        def search(rows: Tensor, wanted: int) -> SearchResult:
            with torch.autocast(self.device.type, enabled=False):
                return (rows @ self.embeddings.T).topk(wanted, dim=1)

        return search_in_order(search, queries, top_k, len(self))

    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""
        return self.embeddings[positions.to(self.device)]

    def save(self, directory: Path) -> None:
        """Write passages as JSON lines and embeddings as safetensors into a new directory that replaces the old."""
        metadata = {
            "format": FORMAT,
            "encoder": self.encoder_fingerprint or "",
            "corpus": self.corpus_fingerprint or "",
        }
        with replace_directory_atomically(directory) as target:
            save_file({"embeddings": self.embeddings.cpu().contiguous()}, target / EMBEDDINGS_FILE, metadata)
            write_nodes(self._passages.nodes, target)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Read a store that `save` wrote.

        Raises:
            KnowledgeStoreError: The directory holds no store, or a damaged one.
        """
        hint = "Build it anew with 'fedrag index CONFIG --rebuild'."
        try:
            with safe_open(directory / EMBEDDINGS_FILE, framework="pt") as file:
                metadata, embeddings = file.metadata() or {}, file.get_tensor("embeddings")
            nodes = read_nodes(directory)
        except FileNotFoundError as error:
            raise KnowledgeStoreError(f"'{directory}' holds no knowledge store: {error}", hint) from error
        except (SafetensorError, ValueError, TypeError, OSError) as error:
            raise KnowledgeStoreError(f"The knowledge store in '{directory}' is damaged: {error}", hint) from error
        if metadata.get("format") != FORMAT or embeddings.ndim != 2 or len(nodes) != len(embeddings):
            raise KnowledgeStoreError(f"The knowledge store in '{directory}' is damaged or of another format.", hint)
        store = cls(device)
        store.add(nodes, embeddings)
        store.encoder_fingerprint = metadata.get("encoder") or None
        store.corpus_fingerprint = metadata.get("corpus") or None
        return store

    def _reserve(self, rows: int, dimension: int) -> None:
        if rows > self._buffer.shape[0]:
            grown = torch.zeros((max(rows, 2 * self._buffer.shape[0]), dimension), device=self.device)
            if len(self):
                grown[: len(self)] = self.embeddings
            self._buffer = grown
