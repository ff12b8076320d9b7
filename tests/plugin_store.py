"""A store that a third party would write, with no more than it must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, check_new


class PlainStore(KnowledgeStore):
    """Keeps each embedding by its passage's id."""

    def __init__(self, config: Any = None, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self._rows: dict[str, Tensor] = {}

    @property
    def dimension(self) -> int:
        return next((len(row) for row in self._rows.values()), 0)

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        check_new(nodes, embeddings, self.dimension)
        self._passages.put(nodes)
        rows = embeddings.detach().to("cpu", torch.float32, copy=True)
        self._rows.update((node.id, row) for node, row in zip(nodes, rows, strict=True))

    def delete(self, ids: Sequence[str]) -> int:
        self._passages.remove(ids)
        return sum(self._rows.pop(id, None) is not None for id in ids)

    def embeddings_at(self, positions: Tensor) -> Tensor:
        rows = [self._rows[node.id] for node in self.nodes_at(positions.flatten().tolist())]
        found = torch.stack(rows) if rows else torch.zeros(0, self.dimension)
        return found.view(*positions.shape, self.dimension).to(self.device)
