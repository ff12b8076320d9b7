"""`fedrag index`: build or refresh the knowledge store."""

from __future__ import annotations

from typing import Any

from fedrag_cli.cli.options import ConfigArguments, JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import session

NAME = "index"


def command(
    arguments: ConfigArguments = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Encode the corpus and save the knowledge store at rag_system.knowledge_store.path."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.config import load_config

        given = sort_arguments(arguments)
        config = load_config(given.path, given.overrides)
        from fedrag_cli.rag.indexing import build_index

        report: dict[str, Any] = build_index(config, current.reporter())
        current.result(report, lambda renderer: renderer.fields(report))
