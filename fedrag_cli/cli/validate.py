"""`fedrag validate`: all that is wrong with a config, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from fedrag_cli.cli.options import ConfigArguments, JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import session


def command(
    arguments: ConfigArguments = None,
    load: Annotated[
        bool, typer.Option("--load", help="Also load data and models, and report sizes, truncation and memory.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a config and report every error with its line; what it names and is not there is a warning."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.config import load_config_with_source
        from fedrag_cli.config.load import config_warnings

        given = sort_arguments(arguments)
        source = load_config_with_source(given.path, given.overrides)
        document = {
            "valid": True,
            "config": str(source.tree.main_file),
            "mode": source.config.trainer.mode,
            "warnings": [warning.to_dict() for warning in config_warnings(source.config, source.tree)],
        }
        if load:
            from fedrag_cli.commands.validate import inspect_config

            document |= {"loaded": inspect_config(source.config, current.reporter())}
        current.result(document, lambda renderer: renderer.validation(document))
