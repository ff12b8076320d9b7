"""What every knowledge store does, those of plug-ins too."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import EMBEDDINGS_FILE
from fedrag_cli.rag.knowledge_stores.exact_search import format_name, rows_at_once, search_blocks, search_in_order
from fedrag_cli.rag.knowledge_stores.store_files import (
    EmbeddingsFile,
    Passages,
    read_nodes,
    read_one_state,
    store_errors,
    write_embeddings,
    write_nodes,
)
from fedrag_cli.runs.files import replace_directory_atomically

FORMAT = "fedrag-memory-store-1"


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

    A plug-in registers a config class that inherits `rag.config.KnowledgeStoreConfig` or `FolderStoreConfig`, and as
    the builder its class's `from_config`. It keeps its passages in `self._passages`, and writes `dimension`, `add`,
    `delete` and `embeddings_at`, and `nearest` where it finds passages more quickly than by a look at all; the rest has
    defaults. What a server keeps overrides `from_config`, `publish`, `require_own_place` and `is_kept_elsewhere`.

    Args:
        config: The settings, of this kind of store.
        device: Where embeddings and the results of searches are put.
    """

    dtype: torch.dtype = torch.float32
    """The number format of the embeddings."""

    def __init__(self, config: Any = None, device: torch.device | str = "cpu") -> None:
        """Start without passages."""
        self.config = config
        self.device = torch.device(device)
        self.encoder_fingerprint: str | None = None
        self.corpus_fingerprint: str | None = None
        self.rounded_to: str | None = None
        """The number format that embeddings in the store were rounded to, here or before they came here."""
        self._passages = Passages()

    @classmethod
    def from_config(cls, config: Any, *, device: torch.device | str = "cpu") -> Self:
        """Open the store that is saved at the config's place, or start an empty one where there is none yet.

        Raises:
            ConnectionFailedError: A server cannot be reached, or refuses the key.
            KnowledgeStoreError: What is there is damaged, or was built with other settings.
        """
        if config.folder is not None and config.folder.exists():
            return cls.load(config.folder, config, device=device)
        return cls(config, device)

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
            KnowledgeStoreError: Sizes do not fit, a value is not finite, or an id occurs twice in `nodes`; see
                `check_new`.
        """

    def replace_embeddings(self, embeddings: Tensor) -> None:
        """Put new embeddings in the place of all old ones, in the order of the passages.

        Args:
            embeddings: Tensor of shape (passages, dimension), finite.

        Raises:
            KnowledgeStoreError: The size does not fit, or a value is not finite.
        """
        nodes, fingerprints = self.nodes, (self.encoder_fingerprint, self.corpus_fingerprint)
        check_new(nodes, embeddings, self.dimension, self.dtype)
        self.clear()
        self.add(nodes, embeddings)
        self.encoder_fingerprint, self.corpus_fingerprint = fingerprints

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints."""
        self.delete([node.id for node in self.nodes])
        self.encoder_fingerprint = self.corpus_fingerprint = self.rounded_to = None

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
        check_search(query_embeddings, top_k, len(self), self.dimension, self._hidden)
        queries = query_embeddings.detach().to("cpu", torch.float32)
        scores, positions = search_in_order(self.nearest, queries, top_k, len(self))
        return scores.to(self.device), positions.to(self.device)

    def nearest(self, queries: Tensor, wanted: int) -> SearchResult:
        """Return scores and positions of shape (queries, wanted) in any order, for queries in float32 on the CPU."""
        return search_blocks(self, queries, wanted)

    @property
    def _hidden(self) -> str:
        """What errors say of the passages that can be found, where they are not all; it begins with a space."""
        return ""

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

    def search(self, query_embeddings: Tensor, top_k: int) -> list[list[ScoredNode]]:
        """Find the best passages of each query; see `search_positions`."""
        return self.scored_nodes(*self.search_positions(query_embeddings, top_k))

    def scored_nodes(self, scores: Tensor, positions: Tensor) -> list[list[ScoredNode]]:
        """Return the passages at positions with their scores, both of shape (queries, top_k)."""
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

    def build_report(self) -> dict[str, Any]:
        """Return what whoever has built the store should know of it, for instance how well its search finds."""
        return {}

    def measure_recall(self, embeddings: Tensor) -> None:  # noqa: B027
        """Compare searches with those over the embeddings that came in, for `build_report`, where the store rounds."""

    def save(self, directory: Path) -> None:
        """Write the store; a kill leaves the old one or the new one, never half."""
        about = {name: str(value or "") for name, value in self.about(FORMAT).items() if name != "passages"}
        if self.rounded_to in (None, format_name(self.dtype)):
            del about["rounded"]
        with replace_directory_atomically(directory) as target:
            shape, offsets = (len(self), self.dimension), self._write_nodes(target)
            write_embeddings(
                target / EMBEDDINGS_FILE, self.blocks(max(1, len(self))), shape, self.dtype, about, offsets
            )

    def about(self, format: str) -> dict[str, Any]:
        """Return what is saved of a store beside its passages and their embeddings."""
        return {
            "format": format,
            "encoder": self.encoder_fingerprint,
            "corpus": self.corpus_fingerprint,
            "rounded": self.rounded_to,
            "passages": len(self),
        }

    def take_about(self, about: dict[str, Any]) -> None:
        """Take over what `about` gave."""
        self.encoder_fingerprint, self.corpus_fingerprint = about.get("encoder") or None, about.get("corpus") or None
        self.rounded_to = about.get("rounded") or None

    def _write_nodes(self, directory: Path) -> list[int]:
        return write_nodes(self.nodes, directory)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Give all embeddings in their order and number format, at most `rows` at once."""
        for start in range(0, len(self), step := min(rows, rows_at_once(self.dimension))):
            yield self.embeddings_at(torch.arange(start, min(start + step, len(self)))).to(self.dtype)

    @classmethod
    def load(cls, directory: Path, config: Any = None, *, device: torch.device | str = "cpu") -> Self:
        """Read a store that `save` wrote.

        Args:
            directory: Its folder.
            config: The settings; what they say of the saved store has to be as it was built.
            device: Where embeddings and the results of searches are put.

        Raises:
            KnowledgeStoreError: The directory holds no store, a damaged one, or one that was built otherwise.
        """
        return read_one_state(directory, lambda: cls._load(directory, config, device))

    @classmethod
    def _load(cls, directory: Path, config: Any, device: torch.device | str) -> Self:
        store = cls(config, device)
        with store_errors(directory):
            file = EmbeddingsFile.open(directory / EMBEDDINGS_FILE)
            if file.metadata.get("format") != FORMAT:
                raise ValueError("it is of another format")
        rounded_here = None if file.dtype == torch.float32 else format_name(file.dtype)
        store.take_about({"rounded": rounded_here, **file.metadata})
        store._read(directory, file)
        return store

    def _read(self, directory: Path, file: EmbeddingsFile) -> None:
        """Take what a folder holds into this empty store."""
        with store_errors(directory):
            nodes = read_nodes(directory)
            require_pairs(len(nodes), file.rows)
            blocks = [block.clone() for block in file.blocks()]
        if nodes:
            self.add(nodes, torch.cat(blocks))

    @property
    def is_kept_elsewhere(self) -> bool:
        """Whether a server holds the store just as it is, so that a run needs no copy of it."""
        return False

    def require_own_place(self, config: Any) -> None:  # noqa: B027
        """Refuse a place, before hours of encoding, where `publish` would destroy something else.

        Folders are looked at by everybody; this is for what only this kind of store can see.

        Raises:
            ConnectionFailedError: A server cannot be reached, or refuses the key.
            KnowledgeStoreError: Something that is not fedrag's is there.
        """

    def filled_from(self, source: KnowledgeStore) -> KnowledgeStore:
        """Return this store, which is empty, with the passages of another; or that one, where it is just like it."""
        if len(source):
            embeddings = source.embeddings
            self.add(source.nodes, embeddings)
            # What is rounded already cannot tell how much rounding costs.
            if source.rounded_to is None:
                self.measure_recall(embeddings)
            self.rounded_to = source.rounded_to or self.rounded_to
        self.encoder_fingerprint, self.corpus_fingerprint = source.encoder_fingerprint, source.corpus_fingerprint
        return self

    def publish(self, source: KnowledgeStore, config: Any) -> KnowledgeStore:
        """Write a store of any kind to the place that a config of this kind names; this one is empty and helps.

        Returns:
            The store that was written.
        """
        store = self.filled_from(source)
        store.save(config.folder)
        return store

    def refresh_place(self, config: Any) -> None:  # noqa: B027
        """Bring up to date, where nothing of the store has changed, what a place keeps beside its passages."""


def require_pairs(passages: int, embeddings: int) -> None:
    """Raise ValueError where passages and embeddings differ in number."""
    if passages != embeddings:
        raise ValueError(f"it has {passages} passages, but {embeddings} embeddings")


def check_new(
    nodes: Sequence[KnowledgeNode], embeddings: Tensor, dimension: int, dtype: torch.dtype = torch.float32
) -> None:
    """Raise KnowledgeStoreError where passages and their embeddings do not fit each other or the store.

    Its dimension takes any where it is 0; its number format has to hold the embeddings too.
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
    repeated = next((id for id, count in Counter(node.id for node in nodes).items() if count > 1), None)
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
    """Raise KnowledgeStoreError where a search cannot be done; `which` says which passages can be found, if not all."""
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
