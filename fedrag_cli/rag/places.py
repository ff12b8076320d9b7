"""Where a config keeps its knowledge store, and what else lies there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.errors import ConfigError
from fedrag_cli.rag.knowledge_stores.passages import EMBEDDINGS_FILE, INDEX_FILE, JOURNAL_FILE, NODES_FILE, STORE_FILE
from fedrag_cli.rag.knowledge_stores.qdrant_folder import LOCK_FILE, META_FILE

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
