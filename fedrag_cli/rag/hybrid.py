"""Hybrid retrieval: what dense and lexical search find, in one ranking."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedrag_cli.config import Config
from fedrag_cli.config.schema import FusionConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.config import LEXICAL_FILE
from fedrag_cli.rag.fusion import best, candidates_of, lexical_bonus, reciprocal_rank_fusion
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult, check_search
from fedrag_cli.registry import build
from fedrag_cli.runs.files import restore_interrupted
from fedrag_cli.runs.reporter import Reporter

if TYPE_CHECKING:
    from fedrag_cli.rag.lexical import LexicalIndex

NUMBERS_AT_ONCE = 2**24
"""Numbers of candidates' embeddings that are gathered at once; more questions are searched block by block."""


def lexical_folder(store: Path | None) -> Path | None:
    """Return the folder of the lexical index beside that of a knowledge store; None where that has none."""
    return None if store is None else store.with_name(f"{store.name}-lexical")


def require_own_lexical_folder(config: Config) -> None:
    """Raise ConfigError where saving the lexical index, which replaces its whole folder, would destroy something else.

    What a kill has left set aside gets its name back first.
    """
    folder = lexical_folder(config.rag_system.knowledge_store.folder)
    if config.rag_system.lexical is None or folder is None:
        return
    restore_interrupted(folder)
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    if found and LEXICAL_FILE not in found:
        raise ConfigError(
            f"'{folder}', where the lexical index goes, holds something else, which would be lost.",
            "Move it away, or set rag_system.knowledge_store.path to another folder.",
        )


def refresh_lexical_index(
    config: Config, nodes: Sequence[KnowledgeNode], reporter: Reporter, *, rebuild: bool = False
) -> str | None:
    """Bring the lexical index beside the knowledge store up to date.

    Args:
        config: Names the lexical side and the store.
        nodes: All passages of the store, by their positions.
        reporter: Shown how far it is.
        rebuild: Whether to build it anew, whatever is there.

    Returns:
        `built` or `kept`; None where the config has no lexical side, or the store no folder beside which it could be.
    """
    settings, folder = config.rag_system.lexical, lexical_folder(config.rag_system.knowledge_store.folder)
    if settings is None or folder is None:
        return None
    if folder.exists() and not rebuild:
        with suppress(KnowledgeStoreError):
            build("lexical", settings, nodes, folder)
            return "kept"
    with reporter.task("Counting the words of the passages", len(nodes), "passage") as advance:
        build("lexical", settings, nodes, None, progress=advance).save(folder)
    return "built"


@dataclass
class HybridSearch:
    """Fuses the search of a knowledge store with BM25 over the same passages.

    Args:
        lexical: The lexical index of the store's passages, by their positions.
        settings: How scores are fused.
    """

    lexical: LexicalIndex
    settings: FusionConfig

    def search(self, store: KnowledgeStore, queries: Sequence[str], embeddings: Tensor, top_k: int) -> SearchResult:
        """Find the best passages of each query.

        Args:
            store: The passages.
            queries: The questions.
            embeddings: Their embeddings, of shape (queries, dimension).
            top_k: How many, from 1 to the number of passages.

        Returns:
            Scores and positions, both of shape (queries, top_k), best first; equal scores by position. With
            method `weighted` a score is the similarity and what the words add to it (see `lexical_bonus`), with `rrf`
            the sum of reciprocal ranks, with `lexical` that of BM25.

        Raises:
            KnowledgeStoreError: As `KnowledgeStore.search_positions`; or the store has got other passages since.
        """
        check_search(embeddings, top_k, len(store), store.dimension)
        if len(self.lexical) != len(store):
            raise KnowledgeStoreError(
                f"The lexical index holds {len(self.lexical)} passages, but the knowledge store {len(store)}.",
                "Build the index anew where passages are added or deleted: HybridSearch(LexicalIndex.build(...), ...).",
            )
        if self.settings.method == "lexical":
            return self.lexical.search(queries, top_k)
        count = min(max(self.settings.candidates, top_k), len(store))
        at_once = max(1, NUMBERS_AT_ONCE // (2 * count * store.dimension))
        # Under autocast, similarities would have the three digits of bfloat16.
        with torch.autocast(store.device.type, enabled=False):
            parts = [
                self._search(store, queries[at_once * number : at_once * (number + 1)], part, count, top_k)
                for number, part in enumerate(embeddings.split(at_once))
            ]
        return torch.cat([scores for scores, _ in parts]), torch.cat([positions for _, positions in parts])

    def _search(
        self, store: KnowledgeStore, queries: Sequence[str], embeddings: Tensor, count: int, top_k: int
    ) -> SearchResult:
        found = store.search_positions(embeddings, count)[1]
        lexical_found = self.lexical.search(queries, count)[1]
        positions, mask = candidates_of(found, lexical_found.to(found.device))
        candidates = store.embeddings_at(positions).float()
        dense = torch.einsum("qd,qcd->qc", embeddings.to(candidates.device, torch.float32), candidates)
        lexical = self.lexical.scores_at(queries, positions).to(dense.device)
        if self.settings.method == "rrf":
            fused = reciprocal_rank_fusion(dense, lexical, mask, self.settings.rrf_constant)
        else:
            bonus = lexical_bonus(dense, lexical, mask, self.settings.weight)
            fused = (dense + bonus).masked_fill(~mask, -torch.inf)
        return best(fused, positions, top_k)

    def save_beside(self, store: Path) -> None:
        """Write the lexical index beside the folder of a knowledge store."""
        folder = lexical_folder(store)
        assert folder is not None
        self.lexical.save(folder)
