"""Where a config keeps its knowledge store, and opening what lies there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.exact_search import format_name
from fedrag_cli.rag.knowledge_stores.qdrant_collection import LOCK_FILE, META_FILE
from fedrag_cli.rag.knowledge_stores.store_files import (
    EMBEDDINGS_FILE,
    INDEX_FILE,
    JOURNAL_FILE,
    NODES_FILE,
    STORE_FILE,
    EmbeddingsFile,
    sentence,
)
from fedrag_cli.registry import build, registry
from fedrag_cli.runs.files import restore_interrupted
from fedrag_cli.runs.reporter import Reporter

# What the folders of stores may hold, by the name of the file that tells its kind.
_FOLDERS = (
    {EMBEDDINGS_FILE, NODES_FILE, JOURNAL_FILE},
    {INDEX_FILE, NODES_FILE, STORE_FILE},
    {"collection", META_FILE, STORE_FILE, LOCK_FILE},
)


def place_of(config: Any) -> str | None:
    """Return the folder of a store, or the server and collection; None where it is only kept in memory.

    Args:
        config: The config dataclass of a knowledge store.
    """
    url = getattr(config, "url", None)
    place: str | None = config.path if url is None else f"{url}/collections/{config.collection}"
    return place


def require_named_place(config: Any, dropped: Sequence[str] = ()) -> str:
    """Return the place of a store.

    Args:
        config: The config dataclass of a knowledge store.
        dropped: Names of settings that another type has dropped; see `ConfigTree.dropped_settings`.

    Raises:
        ConfigError: The config names none.
    """
    place = place_of(config)
    if place is not None:
        return place
    missing = "The config does not say where to save the knowledge store."
    if "path" in dropped:
        missing = f"{missing} The change of type to '{config.type}' dropped the former {', '.join(dropped)}."
    raise ConfigError(
        missing, "Set rag_system.knowledge_store.path, or add rag_system.knowledge_store.path=FOLDER to the command."
    )


def require_own_folder(config: Any) -> None:
    """Check that saving a store, which replaces the whole folder, would destroy nothing else.

    Args:
        config: The config dataclass of a knowledge store.

    Raises:
        ConfigError: It names a folder that holds something other than a store.
    """
    if config.path is None or not Path(config.path).exists():
        return
    path = Path(config.path)
    if not path.is_dir() or not any({file.name for file in path.iterdir()} <= files for files in _FOLDERS):
        raise ConfigError(
            f"'{path}' holds something other than a knowledge store, which would be lost.",
            "Set rag_system.knowledge_store.path to a new or empty folder.",
        )


FULL: Literal["float32"] = "float32"
# The file that tells the type of a store that lies in a folder.
_TYPES = {EMBEDDINGS_FILE: "memory", INDEX_FILE: "faiss", META_FILE: "qdrant"}


@dataclass(frozen=True)
class PreviousStore:
    """What a place holds that is to be indexed anew.

    Args:
        store: The store, with all its passages.
        nodes: The passages, in the order of their positions.
        is_as_wanted: Whether the config wants it of this type and with these settings, so that it may stay.
        held_as: The number format that it rounds embeddings to; None where it does not.
        has_digits: Whether it holds its embeddings with all the digits that the config wants.
        came_as: The number format that they were rounded to before they came there; None where they were not, or where
            the config wants them so.
    """

    store: KnowledgeStore
    nodes: list[KnowledgeNode]
    is_as_wanted: bool
    held_as: Literal["float16", "bfloat16"] | None
    has_digits: bool
    came_as: str | None


def open_store(config: Any, device: torch.device | str = "cpu") -> KnowledgeStore:
    """Open the store that a config names, or start an empty one where there is none yet.

    Args:
        config: The config dataclass of a knowledge store.
        device: Where embeddings and the results of searches are put.

    Raises:
        ConnectionFailedError: Its server cannot be reached, or refuses the key.
        KnowledgeStoreError: It is damaged, or was built with other settings.
    """
    if getattr(config, "path", None) is not None:
        restore_interrupted(config.path)
    store: KnowledgeStore = build("knowledge_store", config, device=device)
    return store


def open_previous(config: Any, reporter: Reporter, *, rebuild: bool) -> PreviousStore | None:
    """Open the store at the place that a config names, of whichever type and with whichever settings it was built.

    Args:
        config: The config dataclass of the knowledge store that is wanted.
        reporter: Told of a store that cannot be opened, where it is to be built anew.
        rebuild: Whether it is to be built anew.

    Returns:
        The store; None where there is none, where it is empty, or where it cannot be opened and is built anew.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The store is damaged, and not to be built anew.
    """
    # A filter restricts searches, not what is kept.
    wanted = dataclasses.replace(config, filter={}) if getattr(config, "filter", None) else config
    if wanted.path is not None:
        restore_interrupted(wanted.path)
        if not _holds_files(Path(wanted.path)):
            return None
    try:
        found = _config_of(wanted)
        store = open_store(found)
        # Here, because passages that were left on disk may turn out to be damaged when they are read.
        nodes = store.nodes
    except (KnowledgeStoreError, ConfigError) as error:
        if not rebuild:
            raise
        reporter.note(f"{sentence(error.message)} It is built anew.")
        return None
    if not nodes:
        return None
    held, needed = (getattr(settings, "dtype", FULL) for settings in (found, wanted))
    came_as = None if store.rounded_to == needed else store.rounded_to
    return PreviousStore(store, nodes, found == wanted, None if held == FULL else held, held in (FULL, needed), came_as)


def _holds_files(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _config_of(wanted: Any) -> Any:
    """Return the config of what lies in the folder of the wanted store."""
    if wanted.path is None or wanted.type not in _TYPES.values():
        return wanted
    folder = Path(wanted.path)
    found = next((kind for file, kind in _TYPES.items() if (folder / file).exists()), wanted.type)
    config = wanted
    if found != wanted.type:
        config = registry().get("knowledge_store", found).config_class(path=wanted.path)
    try:
        return dataclasses.replace(config, **_settings_of(folder, config))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration, SafetensorError):
        # The store itself says best what is damaged.
        return config


def _settings_of(folder: Path, config: Any) -> dict[str, Any]:
    if config.type == "faiss":
        settings: dict[str, Any] = json.loads((folder / STORE_FILE).read_text(encoding="utf-8"))["settings"]
        return settings
    if config.type == "memory":
        return {"dtype": format_name(EmbeddingsFile.open(folder / EMBEDDINGS_FILE).dtype)}
    if config.type == "qdrant":
        collections = json.loads((folder / META_FILE).read_text(encoding="utf-8"))["collections"]
        return {} if config.collection in collections else {"collection": next(iter(collections))}
    return {}
