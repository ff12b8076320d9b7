"""`fedrag evaluate`: metrics with intervals, of a config or of a finished run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import session


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG_OR_RUN] [KEY=VALUE]...",
            help="YAML file (fedrag.yaml by default) or run directory, and settings that win over it.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Write passages, answer and metrics of each question to this file too."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a RAG system on the test (or validation) split; `fedrag resume` goes on with what was stopped."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.config.fields import is_folder
        from fedrag_cli.config.validation import require_evaluation_split
        from fedrag_cli.rag.build import load_config_or_run
        from fedrag_cli.runs.files import require_writable, write_bytes_atomically

        given = sort_arguments(arguments)
        config, source = load_config_or_run(given.path, given.overrides)
        require_evaluation_split(config)
        if predictions is not None:
            require_writable(predictions)
        evaluated_run = given.path if given.path is not None and is_folder(given.path) else None
        from fedrag_cli.commands.evaluate import evaluate

        command_line = ["fedrag", *sys.argv[1:]]
        summary = evaluate(source, current.reporter(), evaluated_run, command=command_line)
        if predictions is not None:
            write_bytes_atomically(predictions, Path(summary["predictions"]).read_bytes())
        current.result(summary, lambda renderer: renderer.evaluation(summary))
