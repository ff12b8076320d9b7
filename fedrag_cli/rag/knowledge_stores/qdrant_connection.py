"""Reaching Qdrant: a server, a folder or memory, and what its errors mean."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrag_cli.errors import ConfigError, ConnectionFailedError, KnowledgeStoreError
from fedrag_cli.rag.config import QdrantStoreConfig
from fedrag_cli.rag.knowledge_stores.faults import sentence

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


def new_folder(directory: Path) -> QdrantClient:
    """Return an embedded Qdrant that writes to an empty folder."""
    return QdrantClient(path=str(directory))


def open_folder(directory: Path, version: str) -> QdrantClient:
    """Return an embedded Qdrant over a folder that a store was saved in.

    Args:
        directory: The folder.
        version: What tells this state of the folder from later ones; clients of the same state are shared.

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
    """Turn errors of Qdrant's client into fedrag's.

    Args:
        place: Where the collection is, for the message.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The server refuses or fails.
    """
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
