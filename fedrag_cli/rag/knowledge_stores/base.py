"""What every knowledge store can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.exact_search import format_name, rows_at_once
from fedrag_cli.rag.knowledge_stores.store_files import Passages


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


def check_new(
    nodes: Sequence[KnowledgeNode], embeddings: Tensor, dimension: int, dtype: torch.dtype = torch.float32
) -> None:
    """Raise KnowledgeStoreError where passages and their embeddings do not fit each other or the store.

    Args:
        nodes: The passages.
        embeddings: What should be a finite tensor of shape (len(nodes), dimension).
        dimension: The store's dimension; 0 takes any.
        dtype: The number format of the store, which has to hold the embeddings too.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] != len(nodes):
        raise KnowledgeStoreError(
            f"{len(nodes)} passages came with embeddings of shape {tuple(embeddings.shape)}; "
            f"expected ({len(nodes)}, dimension)."
        )
    if dimension and embeddings.shape[1] != dimension:
        raise KnowledgeStoreError(
            f"The store's embeddings have {dimension} numbers, the new ones {embeddings.shape[1]}.",
            "Build the store anew with one encoder.",
        )
    check_finite(nodes, embeddings, dtype)
    repeated = _first_repeated([node.id for node in nodes])
    if repeated is not None:
        raise KnowledgeStoreError(f"The passage id '{repeated}' occurs twice.", "Give every passage an id of its own.")


def check_finite(nodes: Sequence[KnowledgeNode], embeddings: Tensor, dtype: torch.dtype) -> None:
    """Raise KnowledgeStoreError that names the first passage whose embedding is not finite in a number format."""
    for start in range(0, len(embeddings), step := rows_at_once(embeddings.shape[1])):
        block = embeddings[start : start + step]
        if bool(torch.isfinite(block.to(dtype)).all()):
            continue
        row = int((~torch.isfinite(block.to(dtype))).any(dim=1).nonzero()[0])
        passage = f"The embedding of the passage '{nodes[start + row].id}'"
        if not bool(torch.isfinite(block[row]).all()):
            raise KnowledgeStoreError(f"{passage} is not finite.", "Look at the weights of the passage encoder.")
        raise KnowledgeStoreError(
            f"{passage} has a number that is too large for {format_name(dtype)}.",
            "Set rag_system.knowledge_store.dtype to bfloat16 or float32.",
        )


def check_search(query_embeddings: Tensor, top_k: int, passages: int, dimension: int, which: str = "") -> None:
    """Raise KnowledgeStoreError where a search cannot be done.

    Args:
        query_embeddings: What should be a finite tensor of shape (queries, dimension).
        top_k: How many passages are wanted of each query.
        passages: How many passages can be found.
        dimension: The store's dimension.
        which: Says which passages these are, where they are not all; it begins with a space.
    """
    if not passages:
        hint = "Add passages before searching." if not which else "Look at rag_system.knowledge_store.filter."
        raise KnowledgeStoreError(f"The knowledge store is empty{which and f': it holds no passages{which}'}.", hint)
    if not 1 <= top_k <= passages:
        raise KnowledgeStoreError(
            f"top_k is {top_k}, but the knowledge store holds {passages} passages{which}.",
            f"Set top_k to a number from 1 to {passages}.",
        )
    if query_embeddings.ndim != 2 or query_embeddings.shape[1] != dimension:
        raise KnowledgeStoreError(
            f"Query embeddings have the shape {tuple(query_embeddings.shape)}; expected (queries, {dimension})."
        )
    # A sum that is finite has finite parts, and is much quicker than a look at each.
    if math.isfinite(query_embeddings.sum().item()):
        return
    broken = (~torch.isfinite(query_embeddings)).any(dim=1).nonzero()
    if len(broken):
        raise KnowledgeStoreError(
            f"The embedding of query {int(broken[0])} is not finite.", "Look at the weights of the query encoder."
        )


def _first_repeated(ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None
