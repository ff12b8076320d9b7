"""`fedrag evaluate`: metrics with intervals, of a config or of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import session

NAME = "evaluate"


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
        typer.Option("--predictions", help="Write passages, answer and metrics of each question to this file."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a RAG system on the test (or validation) split."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.rag.from_run import load_config_or_run

        given = sort_arguments(arguments)
        config, _ = load_config_or_run(given.path, given.overrides)
        from fedrag_cli.trainer_managers.evaluation_run import evaluate_config

        summary = evaluate_config(config, current.reporter(), predictions)
        current.result(summary, lambda renderer: renderer.evaluation(summary))
