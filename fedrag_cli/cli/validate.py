"""`fedrag validate`: all that is wrong with a config, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from fedrag_cli.cli.options import ConfigArguments, load_source
from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(
    current: Session,
    arguments: ConfigArguments = None,
    load: Annotated[
        bool, typer.Option("--load", help="Also load data and models, and report sizes, truncation and memory.")
    ] = False,
) -> None:
    """Check a config and report every error with its line; what it names and is not there is a warning."""
    from fedrag_cli.config.load import config_warnings

    source = load_source(arguments)
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
