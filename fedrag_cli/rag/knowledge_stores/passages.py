"""The passages of a store: their positions, and their file; and the names of the files beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from fedrag_cli.data.nodes import KnowledgeNode

NODES_FILE = "nodes.jsonl"
EMBEDDINGS_FILE = "embeddings.safetensors"
JOURNAL_FILE = "changes.jsonl"
INDEX_FILE = "index.faiss"
STORE_FILE = "store.json"
_ENDS = 65536


class Passages:
    """Passages in the order of their positions.

    Args:
        nodes: The passages to start with, each id once.
    """

    def __init__(self, nodes: Sequence[KnowledgeNode] = ()) -> None:
        """Number the passages."""
        self._number(list(nodes))

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self.nodes)

    def put(self, nodes: Sequence[KnowledgeNode]) -> tuple[dict[int, int], list[int]]:
        """Add passages, or replace those whose id is there already.

        Args:
            nodes: The passages, each id once.

        Returns:
            The positions of replaced passages by their rows in `nodes`, and the rows of the new ones in their order.
        """
        replaced, fresh = {}, []
        for row, node in enumerate(nodes):
            position = self.positions.get(node.id)
            if position is None:
                fresh.append(row)
                self.positions[node.id] = len(self.nodes)
                self.nodes.append(node)
            else:
                replaced[row] = position
                self.nodes[position] = node
        return replaced, fresh

    def remove(self, ids: Collection[str]) -> list[int]:
        """Remove passages and return the old positions of those that stay."""
        gone = {self.positions[id] for id in ids if id in self.positions}
        kept = [position for position in range(len(self.nodes)) if position not in gone]
        if gone:
            self._number([self.nodes[position] for position in kept])
        return kept

    def _number(self, nodes: list[KnowledgeNode]) -> None:
        self.nodes = nodes
        self.positions = {node.id: position for position, node in enumerate(nodes)}


def write_nodes(nodes: Sequence[KnowledgeNode], directory: Path) -> None:
    """Write passages as JSON lines."""
    # Lone surrogates, which UTF-8 cannot hold, become escapes that JSON knows.
    with (directory / NODES_FILE).open("w", encoding="utf-8", errors="backslashreplace") as file:
        for node in nodes:
            row = {"id": node.id, "text": node.text, "metadata": node.metadata}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_nodes(directory: Path) -> list[KnowledgeNode]:
    """Read passages that `write_nodes` wrote; raises OSError, ValueError or TypeError where they are damaged."""
    with (directory / NODES_FILE).open(encoding="utf-8") as lines:
        return [KnowledgeNode(**json.loads(line)) for line in lines]


def file_fingerprint(path: Path) -> str:
    """Return a hash over a file's size, its beginning and its end, of 16 hexadecimal digits.

    It finds what a full disk or a broken copy leaves, before a library reads the file that would crash on it, and
    takes no longer for a large file.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(-min(size, _ENDS), os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()
