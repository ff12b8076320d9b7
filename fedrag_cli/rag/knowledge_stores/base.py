"""What every knowledge store can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.passages import Passages


@dataclass(frozen=True)
class ScoredNode:
    """A retrieved passage.

    Args:
        node: The passage.
        score: Its similarity to the query; higher is better.
    """

    node: KnowledgeNode
    score: float


SearchResult: TypeAlias = tuple[Tensor, Tensor]


class KnowledgeStore(ABC):
    """Passages with their embeddings, and search over them.

    A store carries the fingerprint of the encoder that filled it. Whoever searches says which encoder made the query
    embeddings; another one is refused.

    Args:
        device: Where embeddings and the results of searches are put.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start without passages."""
        self.device = torch.device(device)
        self.encoder_fingerprint: str | None = None
        self.corpus_fingerprint: str | None = None
        self.rounded_to: str | None = None
        """The number format that embeddings in the store were rounded to, here or before they came here."""
        self._passages = Passages()

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._passages)

    @property
    def nodes(self) -> list[KnowledgeNode]:
        """All passages, in the order of their positions; a copy."""
        return list(self._passages.nodes)

    @property
    @abstractmethod
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""

    @abstractmethod
    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add passages; one whose id is there already replaces the old one.

        Args:
            nodes: The passages.
            embeddings: Tensor of shape (len(nodes), dimension), finite.

        Raises:
            KnowledgeStoreError: Sizes do not fit, a value is not finite, or an id occurs twice in `nodes`.
        """

    @abstractmethod
    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones, in the order of the passages.

        Args:
            embeddings: Tensor of shape (passages, dimension), finite.

        Raises:
            KnowledgeStoreError: The size does not fit, or a value is not finite.
        """

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""

    @abstractmethod
    def search_positions(self, query_embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query.

        Args:
            query_embeddings: Tensor of shape (queries, dimension).
            top_k: How many, from 1 to the number of passages.

        Returns:
            Scores and positions, both of shape (queries, top_k), best first; equal scores by position.

        Raises:
            KnowledgeStoreError: The store is empty, top_k is out of range, or sizes do not fit.
        """

    def nodes_at(self, positions: Sequence[int]) -> list[KnowledgeNode]:
        """Return the passages at positions that a search gave."""
        return [self._passages.nodes[position] for position in positions]

    @abstractmethod
    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""

    @property
    def embeddings(self) -> Tensor:
        """All embeddings, of shape (passages, dimension); it may be a view, so do not write into it."""
        return self.embeddings_at(torch.arange(len(self)))

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the store; a kill leaves the old one or the new one, never half."""

    def save_changes(self, directory: Path) -> None:
        """Write what changed since the store was read from or saved to this directory; all of it where that is quicker.

        A kill leaves the old store or the new one, never half.
        """
        self.save(directory)

    def build_report(self) -> dict[str, Any]:
        """Return what whoever has built the store should know of it, for instance how well its search finds."""
        return {}

    @property
    def changes_cheaply(self) -> bool:
        """Whether any change of a saved store costs less than writing it anew; of others only an append does."""
        return False

    @property
    def is_worth_writing(self) -> bool:
        """Whether a saved store that is as it was saved would be read more cheaply after it is written out anew."""
        return False

    @property
    def is_kept_elsewhere(self) -> bool:
        """Whether a server holds the store just as it is, so that a run needs no copy of it."""
        return False

    def search(self, query_embeddings: Tensor, top_k: int) -> list[list[ScoredNode]]:
        """Find the best passages of each query; see `search_positions`."""
        scores, positions = self.search_positions(query_embeddings, top_k)
        return [
            [ScoredNode(node, score) for node, score in zip(self.nodes_at(row), row_scores, strict=True)]
            for row, row_scores in zip(positions.tolist(), scores.tolist(), strict=True)
        ]

    def require_encoder(self, fingerprint: str) -> None:
        """Raise KnowledgeStoreError where the store was filled by another encoder than the one given."""
        if self.encoder_fingerprint is not None and self.encoder_fingerprint != fingerprint:
            raise KnowledgeStoreError(
                f"The knowledge store was filled by another encoder ({self.encoder_fingerprint}) than the retriever's "
                f"({fingerprint}), so its scores would mean nothing.",
                "Refresh it with 'fedrag index CONFIG'.",
            )
