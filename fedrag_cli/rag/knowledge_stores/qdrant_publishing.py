"""Putting a store on a Qdrant server, where others search it meanwhile."""

from __future__ import annotations

import contextlib
import uuid

from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import QdrantStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.qdrant_connection import QdrantClient, connect, models, qdrant_errors
from fedrag_cli.rag.knowledge_stores.qdrant_points import (
    copy_store,
    create_collection,
    create_filter_indexes,
    describe,
    payload_key,
)
from fedrag_cli.rag.knowledge_stores.qdrant_store import QdrantKnowledgeStore


def publish(source: KnowledgeStore, config: QdrantStoreConfig, client: QdrantClient | None = None) -> KnowledgeStore:
    """Write a store into a new collection, and let the configured name point to it when it is complete.

    Whoever searches sees the old passages or the new ones, never half; the old collection is removed afterwards.

    Args:
        source: What to write.
        config: The server, the collection's name and the filter.
        client: The server, where it is connected already.

    Returns:
        The store on the server.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The name belongs to a collection that fedrag did not write, or the server fails.
    """
    server = client if client is not None else connect(config)
    name = f"{config.collection}-{uuid.uuid4().hex[:8]}"
    old = require_own_collection(config, server)
    with qdrant_errors(config.url or "memory"):
        try:
            _fill(server, name, source, config)
            _point_to(server, config.collection, name, replaces=old is not None)
        except BaseException:
            # The first error is the one to report.
            with contextlib.suppress(Exception):
                server.delete_collection(name)
            raise
        if old is not None:
            server.delete_collection(old)
    return QdrantKnowledgeStore(config, client=server)


def require_own_collection(config: QdrantStoreConfig, client: QdrantClient | None = None) -> str | None:
    """Check that publishing would replace nothing but what was published before.

    Args:
        config: The server and the collection's name.
        client: The server, where it is connected already.

    Returns:
        The collection that the name points to; None where nothing has this name yet.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The name belongs to a collection that fedrag did not write.
    """
    server = client if client is not None else connect(config)
    with qdrant_errors(config.url or "memory"):
        old = _target_of(server, config.collection)
        if old is None and server.collection_exists(config.collection):
            raise KnowledgeStoreError(
                f"'{config.collection}' is a collection of its own, which fedrag did not write and leaves alone.",
                "Set rag_system.knowledge_store.collection to another name.",
            )
    return old


def index_filter(config: QdrantStoreConfig) -> None:
    """Let the server find what passes the config's filter, in a collection that was published with another one.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The server fails.
    """
    server = connect(config)
    with qdrant_errors(config.url or "memory"):
        name = _target_of(server, config.collection)
        if name is not None:
            known = server.get_collection(name).payload_schema or {}
            missing = {key: value for key, value in config.filter.items() if payload_key(key) not in known}
            create_filter_indexes(server, name, missing)


def _fill(server: QdrantClient, name: str, source: KnowledgeStore, config: QdrantStoreConfig) -> None:
    create_collection(server, name, source.dimension, describe(source))
    if config.url is not None:
        create_filter_indexes(server, name, config.filter)
    copy_store(source, server, name, config.batch_size)


def _target_of(server: QdrantClient, alias: str) -> str | None:
    aliases = server.get_aliases().aliases
    return next((entry.collection_name for entry in aliases if entry.alias_name == alias), None)


def _point_to(server: QdrantClient, alias: str, name: str, *, replaces: bool) -> None:
    create = models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=name, alias_name=alias))
    delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
    server.update_collection_aliases([delete, create] if replaces else [create])
