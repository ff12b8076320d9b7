"""`fedrag simulate`: a federation in one process."""

from __future__ import annotations

from typing import Annotated

import typer

from fedrag_cli.cli.options import ConfigArguments, load_source
from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(
    current: Session,
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
) -> None:
    """Run a federation in one process; federated.sites says how the data is split over the clients."""
    source = load_source(arguments)
    with current.federation_reporter() as reporter:
        from fedrag_cli.commands.simulate import simulate

        command_line = current.command_line
        summary = simulate(source, reporter, command=command_line, clients=clients, with_baselines=compare)
    current.run_result(summary)
