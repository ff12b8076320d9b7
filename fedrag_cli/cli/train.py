"""`fedrag train`: baseline evaluation, training, evaluation, and the difference."""

from __future__ import annotations

import sys

from fedrag_cli.cli.options import ConfigArguments, JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import session


def command(
    arguments: ConfigArguments = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Tune retriever, generator or both, and measure what it changed."""
    with session(json_output=json, quiet=quiet, verbose=verbose, in_processes=True) as current:
        from fedrag_cli.config import load_config_with_source

        given = sort_arguments(arguments)
        source = load_config_with_source(given.path, given.overrides)
        from fedrag_cli.commands.train import train

        summary = train(source, current.reporter(), command=["fedrag", *sys.argv[1:]])
        current.result(summary, lambda renderer: renderer.training_summary(summary))
