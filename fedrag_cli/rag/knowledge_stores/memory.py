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
from fedrag_cli.rag.knowledge_stores.passages import read_nodes, write_nodes
from fedrag_cli.rag.knowledge_stores.ties import in_order
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
        self.device = torch.device(device)
        self.encoder_fingerprint: str | None = None
        self.corpus_fingerprint: str | None = None
        self._nodes: list[KnowledgeNode] = []
        self._positions: dict[str, int] = {}
        self._buffer = torch.zeros((0, 0), device=self.device)

    @classmethod
    def from_config(cls, config: MemoryStoreConfig, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Load the saved store, or start an empty one where none is saved yet."""
        if config.path is not None and Path(config.path).exists():
            return cls.load(Path(config.path), device=device)
        return cls(device)

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._nodes)

    @property
    def nodes(self) -> list[KnowledgeNode]:
        """All passages, in the order of their positions."""
        return list(self._nodes)

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""
        return self._buffer.shape[1] if len(self) else 0

    @property
    def embeddings(self) -> Tensor:
        """All embeddings, of shape (passages, dimension); a view, so do not write into it."""
        return self._buffer[: len(self._nodes)]

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add or replace passages; see `KnowledgeStore.add`."""
        check_new(nodes, embeddings, self.dimension)
        if not nodes:
            return
        embeddings = embeddings.detach().to(self.device, torch.float32)
        known = {row: self._positions[node.id] for row, node in enumerate(nodes) if node.id in self._positions}
        fresh = [row for row in range(len(nodes)) if row not in known]
        for row, position in known.items():
            self._nodes[position] = nodes[row]
        if known:
            self._buffer[list(known.values())] = embeddings[list(known)]
        self._reserve(len(self) + len(fresh), embeddings.shape[1])
        start = len(self)
        for row in fresh:
            self._positions[nodes[row].id] = len(self._nodes)
            self._nodes.append(nodes[row])
        self._buffer[start : start + len(fresh)] = embeddings[fresh]

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones; see `KnowledgeStore.replace_embeddings`."""
        check_new(self._nodes, embeddings, self.dimension)
        self._buffer = embeddings.detach().to(self.device, torch.float32).clone()

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        gone = {self._positions[id] for id in ids if id in self._positions}
        if gone:
            kept = [position for position in range(len(self)) if position not in gone]
            self._buffer = self._buffer[kept].clone()
            self._nodes = [self._nodes[position] for position in kept]
            self._positions = {node.id: position for position, node in enumerate(self._nodes)}
        return len(gone)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.encoder_fingerprint = self.corpus_fingerprint = None
        self._nodes, self._positions = [], {}
        self._buffer = torch.zeros((0, 0), device=self.device)

    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query by one matrix product; see `KnowledgeStore.search_positions`."""
        check_search(query_embeddings, top_k, len(self), self.dimension)
        queries = query_embeddings.detach().to(self.device, torch.float32)
        with torch.autocast(self.device.type, enabled=False):
            scores = queries @ self.embeddings.T
        best, positions = in_order(*scores.topk(min(top_k + 1, len(self)), dim=1))
        if top_k < len(self):
            # Among passages that tie for the last places topk takes any; the first of them are wanted.
            tied = best[:, top_k - 1] == best[:, top_k]
            best, positions = best[:, :top_k], positions[:, :top_k]
            if bool(tied.any()):
                best[tied], positions[tied] = _first_of_ties(scores[tied], top_k)
        return best, positions

    def nodes_at(self, positions: Sequence[int]) -> list[KnowledgeNode]:
        """Return the passages at positions that a search gave."""
        return [self._nodes[position] for position in positions]

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
            write_nodes(self._nodes, target)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str = "cpu") -> InMemoryKnowledgeStore:
        """Read a store that `save` wrote.

        Raises:
            KnowledgeStoreError: The directory holds no store, or a damaged one.
        """
        hint = "Build it anew with 'fedrag index CONFIG' after removing the folder."
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


def _first_of_ties(scores: Tensor, top_k: int) -> SearchResult:
    """Return the best scores of each row and their positions; of those that tie for the last places, the first."""
    last = scores.topk(top_k, dim=1).values[:, -1:]
    above, level = scores > last, scores == last
    chosen = above | (level & (level.cumsum(dim=1) <= top_k - above.sum(dim=1, keepdim=True)))
    positions = chosen.nonzero()[:, 1].view(-1, top_k)
    return in_order(scores.gather(1, positions), positions)
