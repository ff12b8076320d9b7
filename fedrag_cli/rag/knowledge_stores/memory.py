"""Exact search over embeddings held in memory, on torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import MemoryStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult
from fedrag_cli.rag.knowledge_stores.blocks import search_blocks
from fedrag_cli.rag.knowledge_stores.checks import check_new, check_search
from fedrag_cli.rag.knowledge_stores.embeddings_file import EMBEDDINGS_FILE, EmbeddingsFile, write_embeddings
from fedrag_cli.rag.knowledge_stores.passages import Passages, read_nodes, write_nodes
from fedrag_cli.rag.knowledge_stores.vectors import HeldVectors
from fedrag_cli.runs.atomic import replace_directory_atomically

FORMAT = "fedrag-memory-store-1"


class InMemoryKnowledgeStore(KnowledgeStore):
    """Passages in a list and embeddings in one tensor with room for more.

    Args:
        device: Where the embeddings are kept and searched.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start empty."""
        super().__init__(device)
        self._vectors = HeldVectors(self.device)

    @classmethod
    def from_config(cls, config: MemoryStoreConfig, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Load the saved store, or start an empty one where none is saved yet."""
        if config.path is not None and Path(config.path).exists():
            return cls.load(Path(config.path), device=device)
        return cls(device)

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""
        return self._vectors.dimension

    @property
    def embeddings(self) -> Tensor:
        """All embeddings, of shape (passages, dimension); a view, so do not write into it."""
        return self._vectors.rows

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add or replace passages; see `KnowledgeStore.add`."""
        check_new(nodes, embeddings, self.dimension)
        if not nodes:
            return
        embeddings = embeddings.detach()
        replaced, fresh = self._passages.put(nodes)
        if replaced:
            self._vectors.put(list(replaced.values()), embeddings[list(replaced)])
        if fresh:
            self._vectors.extend(embeddings[fresh] if replaced else embeddings)

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones; see `KnowledgeStore.replace_embeddings`."""
        check_new(self._passages.nodes, embeddings, self.dimension)
        self._vectors.replace(embeddings.detach())

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        old = len(self)
        kept = self._passages.remove(ids)
        if len(kept) < old:
            self._vectors.keep(kept)
        return old - len(kept)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.encoder_fingerprint = self.corpus_fingerprint = None
        self._passages = Passages()
        self._vectors = HeldVectors(self.device)

    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query, block by block; see `KnowledgeStore.search_positions`."""
        check_search(query_embeddings, top_k, len(self), self.dimension)
        return search_blocks(self._vectors, query_embeddings.detach().to(self.device, torch.float32), top_k)

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
            shape = (len(self), self.dimension)
            blocks = self._vectors.blocks(max(1, len(self)))
            write_embeddings(target / EMBEDDINGS_FILE, blocks, shape, torch.float32, metadata)
            write_nodes(self._passages.nodes, target)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Read a store that `save` wrote.

        Raises:
            KnowledgeStoreError: The directory holds no store, or a damaged one.
        """
        hint = "Build it anew with 'fedrag index CONFIG' after removing the folder."
        try:
            file, nodes = EmbeddingsFile.open(directory / EMBEDDINGS_FILE), read_nodes(directory)
            if file.metadata.get("format") != FORMAT or len(nodes) != file.rows:
                raise ValueError("it is of another format, or passages and embeddings differ in number")
            store = cls(device)
            for block in file.blocks():
                store._vectors.extend(block, file.rows)
        except FileNotFoundError as error:
            raise KnowledgeStoreError(f"'{directory}' holds no knowledge store: {error}", hint) from error
        except (SafetensorError, ValueError, TypeError, OSError) as error:
            raise KnowledgeStoreError(f"The knowledge store in '{directory}' is damaged: {error}", hint) from error
        check_new(nodes, store._vectors.rows, 0)
        store._passages = Passages(nodes)
        store.encoder_fingerprint = file.metadata.get("encoder") or None
        store.corpus_fingerprint = file.metadata.get("corpus") or None
        return store
