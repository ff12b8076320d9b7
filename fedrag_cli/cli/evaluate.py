"""`fedrag evaluate`: metrics with intervals, of a config or of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import ConfigOrRunArguments, sort_arguments
from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(
    current: Session,
    arguments: ConfigOrRunArguments = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Write passages, answer and metrics of each question to this file too."),
    ] = None,
) -> None:
    """Measure a RAG system on the test (or validation) split; `fedrag resume` goes on with what was stopped."""
    from fedrag_cli.config.fields import is_folder
    from fedrag_cli.config.validation import require_evaluation_split
    from fedrag_cli.rag.from_run import load_config_or_run
    from fedrag_cli.runs.files import require_writable, write_bytes_atomically

    given = sort_arguments(arguments)
    config, source = load_config_or_run(given.path, given.overrides)
    require_evaluation_split(config)
    if predictions is not None:
        require_writable(predictions)
    evaluated_run = given.path if given.path is not None and is_folder(given.path) else None
    from fedrag_cli.commands.evaluate import evaluate

    summary = evaluate(source, current.reporter(), evaluated_run, command=current.command_line)
    if predictions is not None:
        write_bytes_atomically(predictions, Path(summary["predictions"]).read_bytes())
    current.run_result(summary)
