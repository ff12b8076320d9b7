"""What a knowledge store holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KnowledgeNode:
    """One passage.

    Args:
        id: Unique in its store.
        text: The passage.
        metadata: Further fields of its row, such as a title or an owner. A passage that was split off a longer
            document names it in `document_id`.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
