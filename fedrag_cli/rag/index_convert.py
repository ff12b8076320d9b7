"""Opening the knowledge store that a config names, and writing one there, of whichever type."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from fedrag_cli.config import Config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.config import KnowledgeStoreConfig
from fedrag_cli.rag.hybrid import refresh_lexical_index, require_own_lexical_folder
from fedrag_cli.rag.index_place import require_named_place, require_own_folder, settings_as_built
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.store_files import sentence
from fedrag_cli.registry import build
from fedrag_cli.runs.files import restore_interrupted
from fedrag_cli.runs.reporter import Reporter


@dataclass(frozen=True)
class PreviousStore:
    """What a place holds that is to be indexed anew: the store with all its passages, in their order."""

    store: KnowledgeStore
    nodes: list[KnowledgeNode]
    is_as_wanted: bool
    """Whether the config wants it of this type and with these settings, so that it may stay."""
    number_format: str
    """The format that it rounds embeddings to."""


def open_store(config: KnowledgeStoreConfig, device: torch.device | str = "cpu") -> KnowledgeStore:
    """Open the store that a config names, or start an empty one where there is none yet.

    Raises:
        ConnectionFailedError: Its server cannot be reached, or refuses the key.
        KnowledgeStoreError: It is damaged, or was built with other settings.
    """
    if config.folder is not None:
        restore_interrupted(config.folder)
    store: KnowledgeStore = build("knowledge_store", config, device=device)
    return store


def open_previous(config: KnowledgeStoreConfig, reporter: Reporter, *, rebuild: bool) -> PreviousStore | None:
    """Open the store at the place that a config names, of whichever type and with whichever settings it was built.

    Returns:
        The store; None where there is none, where it is empty, or where it cannot be opened and is built anew.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The store is damaged, and not to be built anew.
    """
    wanted = config.unfiltered()
    if wanted.folder is not None:
        restore_interrupted(wanted.folder)
        if not wanted.folder.exists() or (wanted.folder.is_dir() and not any(wanted.folder.iterdir())):
            return None
    try:
        found = settings_as_built(wanted)
        store = open_store(found)
        # Here, because passages that were left on disk may turn out to be damaged when they are read.
        nodes = store.nodes
    except (KnowledgeStoreError, ConfigError) as error:
        if not rebuild:
            raise
        reporter.note(f"{sentence(error.message)} It is built anew.")
        return None
    return PreviousStore(store, nodes, found == wanted, found.number_format) if nodes else None


def move_index(config: Config, target: Config, reporter: Reporter, *, replace: bool = False) -> dict[str, Any]:
    """Copy the built store of one config to where another wants it, without encoding anything.

    Args:
        config: Names the store that is built; it stays as it is.
        target: Names the type and place of the new one.
        reporter: Told what is being done.
        replace: Whether the place may hold a store of other passages, which is lost then.

    Returns:
        Where the new store is, how many passages it holds, its fingerprints, what its kind reports, and the time taken.

    Raises:
        ConfigError: A config names no place, both name the same, or the place holds something else.
        KnowledgeStoreError: Nothing is built there yet, or it is damaged; or the place holds a store of other passages.
        ConnectionFailedError: A server cannot be reached.
    """
    source, wanted = config.rag_system.knowledge_store, target.rag_system.knowledge_store
    place = require_place(wanted)
    require_own_lexical_folder(target)
    if require_named_place(source) == place:
        raise ConfigError(f"Both configs name the same knowledge store: {place}", "Give the second another place.")
    started = time.monotonic()
    reporter.note("Opening the knowledge store")
    store = open_store(source)
    if not len(store):
        missing = f"There is no knowledge store at {source.place} yet."
        raise KnowledgeStoreError(missing, "Build it first with 'fedrag index CONFIG'.")
    if store.corpus_fingerprint is None:
        stale = (
            f"The knowledge store at {source.place} has changes beside it that an earlier version of fedrag has left."
        )
        raise KnowledgeStoreError(stale, "Refresh it first with 'fedrag index CONFIG'.")
    if not replace:
        _require_same_passages(wanted, store, place, reporter)
    reporter.note(f"Writing {len(store)} passages to {place}")
    if store.rounded_to is not None and store.rounded_to != wanted.number_format:
        reporter.note(
            f"The embeddings were rounded to {store.rounded_to} and stay so; "
            "'fedrag index OTHER_CONFIG --rebuild' encodes them with all digits."
        )
    written = write_store(store, wanted)
    lexical = refresh_lexical_index(target, store.nodes, reporter)
    report = store_report(written, store, wanted, started)
    return report if lexical is None else {**report, "lexical": lexical}


def _require_same_passages(wanted: KnowledgeStoreConfig, store: KnowledgeStore, place: str, reporter: Reporter) -> None:
    """Refuse a place that holds a store of other passages than the one that is moved there, or one without saying."""
    hint = "Name another place in OTHER_CONFIG, or add --replace to put the moved store there all the same."
    try:
        previous = open_previous(wanted, reporter, rebuild=False)
    except (KnowledgeStoreError, ConfigError) as error:
        raise KnowledgeStoreError(error.message, hint) from error
    if previous is not None and previous.store.corpus_fingerprint != store.corpus_fingerprint:
        raise KnowledgeStoreError(f"{place} holds a knowledge store of other passages, which would be lost.", hint)


def store_report(
    written: KnowledgeStore, source: KnowledgeStore, config: KnowledgeStoreConfig, started: float, **counts: float
) -> dict[str, Any]:
    """Return what there is to say of a store that was written; a filter may hide a part of it, not of its source."""
    about = written.build_report()
    if source.rounded_to is not None and about.get("dtype") != source.rounded_to:
        about["rounded_to"] = source.rounded_to
    return {
        "path": config.place,
        "type": config.type,
        "passages": len(source),
        **counts,
        "dimension": source.dimension,
        "encoder_fingerprint": source.encoder_fingerprint,
        "corpus_fingerprint": source.corpus_fingerprint,
        **about,
        "seconds": round(time.monotonic() - started, 2),
    }


def write_store(store: KnowledgeStore, config: KnowledgeStoreConfig) -> KnowledgeStore:
    """Write a store of any type to the place that a config names, in the place of an old one; return what is there."""
    return _empty_store(config.unfiltered()).publish(store, config)


def converted_store(
    store: KnowledgeStore, config: KnowledgeStoreConfig, device: torch.device | str = "cpu"
) -> KnowledgeStore:
    """Return a store of the type and number format that a config names with the passages of another, in memory."""
    return _empty_store(config, device).filled_from(store)


def _empty_store(config: KnowledgeStoreConfig, device: torch.device | str = "cpu") -> KnowledgeStore:
    """Return an empty store of the type that a config names; what its place holds is not looked at."""
    return open_store(config.unplaced(), device)


def require_place(config: KnowledgeStoreConfig) -> str:
    """Return the place of a store after checking that writing there would destroy nothing else.

    Raises:
        ConfigError: The config names none, or a folder that holds something other than a store.
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The server has a collection of that name which fedrag did not write.
    """
    place = require_named_place(config)
    require_own_folder(config)
    _empty_store(config).require_own_place(config)
    return place
