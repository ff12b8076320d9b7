"""What has changed between a built knowledge store and the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedrag_cli.data.nodes import KnowledgeNode


@dataclass(frozen=True)
class Changes:
    """How a corpus differs from the passages of an old store.

    Args:
        reused: The positions of embeddings in the old store that stay right, by the rows of their passages.
        encoded: The rows of the passages that have to be encoded, ascending.
        written: The rows of the passages that are new or differ in anything, ascending.
        removed: The ids of the old store's passages that the corpus no longer has.
        keeps_order: Whether the old passages that stay come first, in their old order.
    """

    reused: dict[int, int]
    encoded: list[int]
    written: list[int]
    removed: list[str]
    keeps_order: bool

    @property
    def only_appends(self) -> bool:
        """Whether the corpus is the old store's passages with others behind them."""
        passages = len(self.reused) + len(self.encoded)
        appended = range(passages - len(self.written), passages)
        return self.keeps_order and not self.removed and self.written == list(appended)


def find_changes(old: Sequence[KnowledgeNode], nodes: Sequence[KnowledgeNode], *, reusable: bool) -> Changes:
    """Compare a corpus with the passages of an old store.

    An embedding depends on a passage's text alone, so that one that only has another id or other metadata keeps it.

    Args:
        old: The passages of the old store, in the order of their positions; their ids are unique.
        nodes: The passages of the corpus, in its order; their ids are unique.
        reusable: Whether the old store's embeddings are those that the encoder would compute.
    """
    position_of_id = {node.id: position for position, node in enumerate(old)}
    position_of_text = {node.text: position for position, node in enumerate(old)} if reusable else {}
    reused: dict[int, int] = {}
    encoded, written = [], []
    for row, node in enumerate(nodes):
        position = position_of_id.get(node.id)
        if position is None or old[position] != node:
            written.append(row)
        # The passage's own embedding first: that of the same text elsewhere may differ in its last bits.
        if position is None or old[position].text != node.text:
            position = position_of_text.get(node.text)
        if reusable and position is not None:
            reused[row] = position
        else:
            encoded.append(row)
    ids = {node.id for node in nodes}
    staying = [node.id for node in old if node.id in ids]
    return Changes(
        reused,
        encoded,
        written,
        removed=[node.id for node in old if node.id not in ids],
        keeps_order=staying == [node.id for node in nodes[: len(staying)]],
    )
