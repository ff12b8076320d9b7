"""Reaching Qdrant, and passages as points of its collections."""

from __future__ import annotations

import atexit
import json
import os
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, ConnectionFailedError, KnowledgeStoreError
from fedrag_cli.rag.config import QDRANT_LOCK_FILE, STORE_FILE, QdrantStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.store_files import (
    REBUILD,
    file_fingerprint,
    sentence,
    store_errors,
)

try:
    from qdrant_client import QdrantClient as QdrantClient
    from qdrant_client import models as models
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
except ImportError as import_error:
    raise ConfigError(
        "The knowledge store 'qdrant' needs the package qdrant-client, which is not installed.",
        "Install it with: pip install 'fedrag-cli[qdrant]'",
    ) from import_error

API_KEY_VARIABLE = "QDRANT_API_KEY"
_NO_ENTRY = (401, 403)
# A folder is locked by the client that has it open, also against others of the same process.
_open_folders: weakref.WeakValueDictionary[tuple[Path, str], QdrantClient] = weakref.WeakValueDictionary()


def connect(config: QdrantStoreConfig) -> QdrantClient:
    """Return a client of the server at `url`; nothing is sent yet."""
    return QdrantClient(url=config.url, api_key=config.api_key, timeout=config.timeout, check_compatibility=False)


def in_memory() -> QdrantClient:
    """Return an embedded Qdrant that is gone with the process."""
    return QdrantClient(":memory:")


def open_folder(directory: Path, version: str) -> QdrantClient:
    """Return an embedded Qdrant over a folder that a store was saved in; clients of the same version are shared.

    Raises:
        KnowledgeStoreError: Another process has the folder open.
    """
    key = (directory.resolve(), version)
    client = _open_folders.get(key)
    if client is None:
        try:
            client = QdrantClient(path=str(directory))
        except RuntimeError as error:
            raise KnowledgeStoreError(
                f"The knowledge store in '{directory}' cannot be opened: {sentence(str(error))}",
                "An embedded Qdrant serves one process at a time: end the other one, or run a server and set "
                "rag_system.knowledge_store.url.",
            ) from error
        _open_folders[key] = client
    return client


@atexit.register
def _close_folders() -> None:
    """Unlock the folders while Python is whole; later the client's own attempt fails, and says so."""
    for client in list(_open_folders.values()):
        client.close()


@contextmanager
def qdrant_errors(place: str) -> Iterator[None]:
    """Turn errors of Qdrant's client into ConnectionFailedError and KnowledgeStoreError, which name the place."""
    try:
        yield
    except ResponseHandlingException as error:
        raise ConnectionFailedError(
            f"The Qdrant server at {place} cannot be reached: {sentence(str(error))}",
            "Check that it runs and that rag_system.knowledge_store.url is right.",
        ) from error
    except UnexpectedResponse as error:
        if error.status_code in _NO_ENTRY:
            raise ConnectionFailedError(
                f"The Qdrant server at {place} refuses the API key (HTTP {error.status_code}).", _key_hint()
            ) from error
        answer = error.content.decode(errors="replace")[:300]
        raise KnowledgeStoreError(
            f"The Qdrant server at {place} answered with HTTP {error.status_code}: {answer}",
            "Look into the server's log.",
        ) from error


def _key_hint() -> str:
    reference = "${oc.env:" + API_KEY_VARIABLE + "}"
    if os.environ.get(API_KEY_VARIABLE):
        return f"Set rag_system.knowledge_store.api_key to {reference}, and check the key in {API_KEY_VARIABLE}."
    return f"Put it into the environment as {API_KEY_VARIABLE}, and set rag_system.knowledge_store.api_key: {reference}"


FOLDER_FORMAT = "fedrag-qdrant-folder-1"


def seal_folder(directory: Path) -> None:
    """Note what a folder holds, after the client that wrote it is closed; it is not written to again."""
    (directory / QDRANT_LOCK_FILE).unlink()
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    about = {
        "format": FOLDER_FORMAT,
        "version": uuid.uuid4().hex,
        "files": {path.relative_to(directory).as_posix(): file_fingerprint(path) for path in files},
    }
    (directory / STORE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def version_of_folder(directory: Path) -> str:
    """Return what tells this state of a folder from all others, after a look at its files.

    Raises:
        KnowledgeStoreError: The folder holds no store, or a damaged one.
    """
    with store_errors(directory, " of Qdrant", AttributeError):
        about = json.loads((directory / STORE_FILE).read_text(encoding="utf-8"))
        if about["format"] != FOLDER_FORMAT:
            raise KnowledgeStoreError(f"The knowledge store in '{directory}' is of another format.", REBUILD)
        for name, fingerprint in about["files"].items():
            if file_fingerprint(directory / name) != fingerprint:
                raise KnowledgeStoreError(
                    f"The knowledge store in '{directory}' is damaged: '{name}' is not as it was written.", REBUILD
                )
        return str(about["version"])


_NAMESPACE = uuid.UUID("8f3c1b1e-52f7-4c8f-9a53-6d0a1f6f0c55")
_PAGE = 1000
_COPIED_AT_ONCE = 4096


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
    """Write passages in batches, each with a number in whose order they are read back; old ones are overwritten."""
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
