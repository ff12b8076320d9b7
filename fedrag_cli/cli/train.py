"""`fedrag train`: baseline evaluation, training, evaluation, and the difference."""

from __future__ import annotations

from fedrag_cli.cli.options import ConfigArguments, load_source
from fedrag_cli.cli.session import Session, in_session


@in_session(in_processes=True)
def command(current: Session, arguments: ConfigArguments = None) -> None:
    """Tune retriever, generator or both, and measure what it changed."""
    source = load_source(arguments)
    from fedrag_cli.commands.train import train

    summary = train(source, current.reporter(), command=current.command_line)
    current.run_result(summary)
