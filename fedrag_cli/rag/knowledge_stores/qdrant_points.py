"""Passages as points of a Qdrant collection: writing, reading and searching them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.qdrant_connection import QdrantClient, models

_NAMESPACE = uuid.UUID("8f3c1b1e-52f7-4c8f-9a53-6d0a1f6f0c55")
_PAGE = 1000
_COPIED_AT_ONCE = 4096
FORMAT = "fedrag-qdrant-store-1"


def point_id(node_id: str) -> str:
    """Return the id of a passage's point; the same id of a passage gives the same one everywhere."""
    return str(uuid.uuid5(_NAMESPACE, node_id))


def payload_key(name: str) -> str:
    """Return where a point keeps a passage's metadata of a name."""
    return f"metadata.{name}"


def metadata_filter(wanted: Mapping[str, str | int | bool]) -> models.Filter | None:
    """Return the filter that passes what has all these metadata; None where there is none."""
    conditions = [
        models.FieldCondition(key=payload_key(key), match=models.MatchValue(value=value))
        for key, value in wanted.items()
    ]
    return models.Filter(must=list(conditions)) if conditions else None


def create_collection(client: QdrantClient, name: str, dimension: int, about: dict[str, Any]) -> None:
    """Make a collection whose scores are inner products."""
    vectors = models.VectorParams(size=dimension, distance=models.Distance.DOT)
    client.create_collection(name, vectors_config=vectors, metadata=about)


def create_filter_indexes(client: QdrantClient, name: str, wanted: Mapping[str, str | int | bool]) -> None:
    """Let a server find the passages that pass a filter without looking at all."""
    kinds = {
        str: models.PayloadSchemaType.KEYWORD,
        bool: models.PayloadSchemaType.BOOL,
        int: models.PayloadSchemaType.INTEGER,
    }
    for key, value in wanted.items():
        client.create_payload_index(name, payload_key(key), field_schema=kinds[type(value)])


def write_points(
    client: QdrantClient,
    name: str,
    nodes: Sequence[KnowledgeNode],
    embeddings: Tensor,
    places: Sequence[int],
    batch_size: int,
) -> None:
    """Write passages in batches; one that is there is overwritten.

    Args:
        client: Where to write.
        name: The collection.
        nodes: The passages.
        embeddings: Float tensor of shape (len(nodes), dimension).
        places: A number for each passage; passages are read back in the order of these.
        batch_size: How many are sent at once.
    """
    points = (
        models.PointStruct(
            id=point_id(node.id),
            vector=embeddings[row].tolist(),
            payload={"id": node.id, "text": node.text, "metadata": node.metadata, "place": place},
        )
        for row, (node, place) in enumerate(zip(nodes, places, strict=True))
    )
    client.upload_points(name, points, batch_size=batch_size, wait=True)


def copy_store(source: KnowledgeStore, client: QdrantClient, name: str, batch_size: int) -> None:
    """Write all passages of a store into an empty collection, without holding all embeddings twice."""
    for start in range(0, len(source), _COPIED_AT_ONCE):
        positions = torch.arange(start, min(start + _COPIED_AT_ONCE, len(source)))
        nodes, embeddings = source.nodes_at(positions.tolist()), source.embeddings_at(positions).cpu()
        write_points(client, name, nodes, embeddings, positions.tolist(), batch_size)


def describe(source: KnowledgeStore) -> dict[str, Any]:
    """Return what a collection keeps beside the passages of a store."""
    return {
        "format": FORMAT,
        "encoder": source.encoder_fingerprint,
        "corpus": source.corpus_fingerprint,
        "rounded": source.rounded_to,
        "passages": len(source),
    }


def read_passages(
    client: QdrantClient, name: str, passing: models.Filter | None
) -> tuple[list[KnowledgeNode], list[int]]:
    """Return the passages that pass a filter, in the order of their places, and these places.

    Raises:
        KeyError: A point is none that `write_points` wrote.
    """
    rows = [record.payload or {} for record in _scroll(client, name, passing)]
    rows.sort(key=lambda row: row["place"])
    nodes = [KnowledgeNode(row["id"], row["text"], row["metadata"] or {}) for row in rows]
    return nodes, [row["place"] for row in rows]


def _scroll(client: QdrantClient, name: str, passing: models.Filter | None) -> Iterator[models.Record]:
    offset = None
    while True:
        records, offset = client.scroll(name, scroll_filter=passing, limit=_PAGE, offset=offset)
        yield from records
        if offset is None:
            return


def read_vectors(client: QdrantClient, name: str, ids: Sequence[str]) -> Tensor:
    """Return the embeddings of points, of shape (len(ids), dimension).

    Raises:
        KeyError: A point is missing.
    """
    found: dict[str, Any] = {}
    for start in range(0, len(ids), _PAGE):
        batch = list(ids[start : start + _PAGE])
        for record in client.retrieve(name, batch, with_payload=False, with_vectors=True):
            found[str(record.id)] = record.vector
    return torch.tensor([found[id] for id in ids], dtype=torch.float32)


def search_points(
    client: QdrantClient,
    name: str,
    queries: Tensor,
    wanted: int,
    passing: models.Filter | None,
    *,
    exact: bool,
    batch_size: int,
) -> list[list[tuple[str, float]]]:
    """Return ids and scores of the best points of each query, up to `wanted` of each."""
    found: list[list[tuple[str, float]]] = []
    for batch in queries.split(batch_size):
        requests = [
            models.QueryRequest(
                query=cast(list[float], query.tolist()),
                limit=wanted,
                filter=passing,
                params=models.SearchParams(exact=exact),
            )
            for query in batch
        ]
        for answer in client.query_batch_points(name, requests):
            found.append([(str(point.id), float(point.score)) for point in answer.points])
    return found
