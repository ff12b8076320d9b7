"""Writing a built knowledge store to where a config wants it, of whichever type."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from fedrag_cli.config import Config
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.index_place import (
    FULL,
    open_previous,
    open_store,
    place_of,
    require_named_place,
    require_own_folder,
)
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.registry import build
from fedrag_cli.runs.reporter import Reporter


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
    if require_named_place(source) == place:
        raise ConfigError(f"Both configs name the same knowledge store: {place}", "Give the second another place.")
    started = time.monotonic()
    reporter.note("Opening the knowledge store")
    store = open_store(source)
    if not len(store):
        missing = f"There is no knowledge store at {place_of(source)} yet."
        raise KnowledgeStoreError(missing, "Build it first with 'fedrag index CONFIG'.")
    if not replace:
        _require_same_passages(wanted, store, place, reporter)
    reporter.note(f"Writing {len(store)} passages to {place}")
    if store.rounded_to is not None and store.rounded_to != getattr(wanted, "dtype", FULL):
        reporter.note(
            f"The embeddings were rounded to {store.rounded_to} and stay so; "
            "'fedrag index OTHER_CONFIG --rebuild' encodes them with all digits."
        )
    return store_report(write_store(store, wanted), store, wanted, started)


def _require_same_passages(wanted: Any, store: KnowledgeStore, place: str, reporter: Reporter) -> None:
    """Refuse a place that holds a store of other passages than the one that is moved there, or one without saying."""
    hint = "Name another place in OTHER_CONFIG, or add --replace to put the moved store there all the same."
    try:
        previous = open_previous(wanted, reporter, rebuild=False)
    except (KnowledgeStoreError, ConfigError) as error:
        raise KnowledgeStoreError(error.message, hint) from error
    if previous is not None and previous.store.corpus_fingerprint != store.corpus_fingerprint:
        raise KnowledgeStoreError(f"{place} holds a knowledge store of other passages, which would be lost.", hint)


def store_report(
    written: KnowledgeStore, source: KnowledgeStore, config: Any, started: float, **counts: float
) -> dict[str, Any]:
    """Return what there is to say of a store that was written.

    Args:
        written: The store at its place; a filter may hide a part of it.
        source: What it was made of, all of it; or the same store.
        config: The config dataclass that names the place.
        started: When the work began, by `time.monotonic()`.
        counts: Further numbers about the passages.
    """
    about = written.build_report()
    if source.rounded_to is not None and about.get("dtype") != source.rounded_to:
        about["rounded_to"] = source.rounded_to
    return {
        "path": place_of(config),
        "type": config.type,
        "passages": len(source),
        **counts,
        "dimension": source.dimension,
        "encoder_fingerprint": source.encoder_fingerprint,
        "corpus_fingerprint": source.corpus_fingerprint,
        **about,
        "seconds": round(time.monotonic() - started, 2),
    }


def write_store(store: KnowledgeStore, config: Any) -> KnowledgeStore:
    """Write a store to the place that a store's config names, in the place of an old one.

    Args:
        store: What to write.
        config: The config dataclass of the store that is wanted; its type may be another.

    Returns:
        The store that was written.
    """
    if getattr(config, "url", None) is not None:
        from fedrag_cli.rag.knowledge_stores.qdrant_store import publish

        return publish(store, config)
    path = require_place(config)
    # A filter restricts searches, not what is kept.
    kept = dataclasses.replace(config, filter={}) if getattr(config, "filter", None) else config
    converted = converted_store(store, kept)
    converted.save(Path(path))
    return converted


def keep_store(store: KnowledgeStore, config: Any) -> None:
    """Leave an unchanged store at its place, but for what makes later uses of it quicker.

    Args:
        store: The store as it was opened there.
        config: The config dataclass that names the place.
    """
    if config.path is not None and store.is_worth_writing:
        store.save(Path(config.path))
    if getattr(config, "url", None) is not None and config.filter:
        from fedrag_cli.rag.knowledge_stores.qdrant_store import index_filter

        index_filter(config)


def converted_store(store: KnowledgeStore, config: Any, device: torch.device | str = "cpu") -> KnowledgeStore:
    """Return a store of the type and number format that a config names with the passages of another, in memory."""
    # An empty store of the right type; what its place holds is not looked at.
    changes = {name: None for name in ("path", "url") if getattr(config, name, None) is not None}
    empty: KnowledgeStore = build("knowledge_store", dataclasses.replace(config, **changes), device=device)
    held_as = store.dtype if isinstance(store, InMemoryKnowledgeStore) else None
    if isinstance(empty, InMemoryKnowledgeStore) and empty.dtype == held_as:
        return store
    if len(store):
        embeddings = store.embeddings
        empty.add(store.nodes, embeddings)
        # What is rounded already cannot tell how much rounding costs.
        if isinstance(empty, InMemoryKnowledgeStore) and store.rounded_to is None:
            empty.measure_recall(embeddings)
        empty.rounded_to = store.rounded_to or empty.rounded_to
    empty.encoder_fingerprint, empty.corpus_fingerprint = store.encoder_fingerprint, store.corpus_fingerprint
    return empty


def require_place(config: Any) -> str:
    """Return the place of a store after checking that writing there would destroy nothing else.

    Raises:
        ConfigError: The config names none, or a folder that holds something other than a store.
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The server has a collection of that name which fedrag did not write.
    """
    place = require_named_place(config)
    require_own_folder(config)
    if getattr(config, "url", None) is not None:
        from fedrag_cli.rag.knowledge_stores.qdrant_store import require_own_collection

        require_own_collection(config)
    return place
