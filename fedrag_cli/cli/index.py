"""`fedrag index`: build, refresh or move the knowledge store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedrag_cli.cli.options import ConfigArguments, load_source
from fedrag_cli.cli.session import Session, in_session
from fedrag_cli.errors import ConfigError


@in_session()
def command(
    current: Session,
    arguments: ConfigArguments = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="OTHER_CONFIG",
            help="Encode nothing; copy CONFIG's built store to the rag_system.knowledge_store of OTHER_CONFIG, "
            "for instance from memory to faiss or qdrant.",
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Encode all passages anew, whatever the old store holds, also a damaged one."),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="With --to: also in the place of a built store of other passages."),
    ] = False,
) -> None:
    """Bring the knowledge store where rag_system.knowledge_store says up to date: only what is new is encoded."""
    from fedrag_cli.config import load_config
    from fedrag_cli.rag.index_place import require_named_place, require_own_folder

    if to is not None and rebuild:
        raise ConfigError("--rebuild encodes, and --to encodes nothing.", "Leave one of them out.")
    if replace and to is None:
        raise ConfigError("--replace is for --to.", "Leave it out; 'fedrag index' refreshes what it finds.")
    source = load_source(arguments)
    config, target = source.config, load_config(to) if to is not None else None
    # What the config lacks is told before the libraries are imported, which takes seconds.
    key = ("rag_system", "knowledge_store")
    require_named_place(config.rag_system.knowledge_store, source.tree.dropped_settings(key))
    written = (target or config).rag_system.knowledge_store
    require_named_place(written)
    require_own_folder(written)
    from fedrag_cli.rag.index_build import build_index
    from fedrag_cli.rag.index_convert import move_index

    report: dict[str, Any]
    if target is not None:
        report = move_index(config, target, current.reporter(), replace=replace)
    else:
        report = build_index(config, current.reporter(), rebuild=rebuild)
    current.result(report, lambda renderer: renderer.fields(report))
