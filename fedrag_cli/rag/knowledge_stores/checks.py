"""What every knowledge store refuses, in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.vectors import format_name, rows_at_once


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
