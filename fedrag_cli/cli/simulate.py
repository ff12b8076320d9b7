"""`fedrag simulate`: a federation in one process."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fedrag_cli.cli.options import ConfigArguments, JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import session


def command(
    arguments: ConfigArguments = None,
    clients: Annotated[
        int | None,
        typer.Option("--clients", "-c", min=1, help="How many clients; by default that of the owners in the data."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Train on the pooled data and on each site's alone too, and compare all of them."
        ),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run a federation in one process; federated.sites says how the data is split over the clients."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.config import load_config_with_source

        given = sort_arguments(arguments)
        source = load_config_with_source(given.path, given.overrides)
        with current.federation_reporter() as reporter:
            from fedrag_cli.commands.simulate import simulate

            command_line = ["fedrag", *sys.argv[1:]]
            summary = simulate(source, reporter, command=command_line, clients=clients, with_baselines=compare)
        current.result(summary, lambda renderer: renderer.federation_summary(summary))
