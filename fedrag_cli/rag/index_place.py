"""Where a config keeps its knowledge store, and of which kind is what lies there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedrag_cli.errors import ConfigError
from fedrag_cli.rag.config import FolderStoreConfig, KnowledgeStoreConfig
from fedrag_cli.registry import registry


def require_named_place(config: KnowledgeStoreConfig, dropped: Sequence[str] = ()) -> str:
    """Return the place of a store; raise ConfigError where the config names none, or has dropped the old type's."""
    if config.place is not None:
        return config.place
    missing = "The config does not say where to save the knowledge store."
    if "path" in dropped:
        missing = f"{missing} The change of type to '{config.type}' dropped the former {', '.join(dropped)}."
    raise ConfigError(
        missing, "Set rag_system.knowledge_store.path, or add rag_system.knowledge_store.path=FOLDER to the command."
    )


def require_own_folder(config: KnowledgeStoreConfig) -> None:
    """Raise ConfigError where saving a store, which replaces the whole folder, would destroy something else."""
    folder = config.folder
    if folder is None or not folder.exists():
        return
    if not folder.is_dir() or not any({file.name for file in folder.iterdir()} <= kind.own_files for kind in _kinds()):
        raise ConfigError(
            f"'{folder}' holds something other than a knowledge store, which would be lost.",
            "Set rag_system.knowledge_store.path to a new or empty folder.",
        )


def settings_as_built(config: KnowledgeStoreConfig) -> KnowledgeStoreConfig:
    """Return the settings of the store that lies at a config's place, of whichever kind and however it was built."""
    if not isinstance(config, FolderStoreConfig) or config.folder is None or not config.folder.is_dir():
        return config
    others = (kind for kind in _kinds() if kind is not type(config))
    found = config.as_built() or next(filter(None, (_in_folder_of(config, kind) for kind in others)), None)
    return found or config


def _in_folder_of(config: FolderStoreConfig, kind: type[FolderStoreConfig]) -> FolderStoreConfig | None:
    try:
        return kind(type=kind.type, path=config.path).as_built()
    except TypeError:
        # A kind of a plug-in has settings without a default, which nobody can guess.
        return None


def _kinds() -> Iterator[type[FolderStoreConfig]]:
    for component in registry().of_kind("knowledge_store").values():
        if issubclass(component.config_class, FolderStoreConfig):
            yield component.config_class
