"""`fedrag serve-fl`: the server of a federation."""

from __future__ import annotations

from typing import Annotated

import typer

from fedrag_cli.cli.options import AddressOption, ConfigArguments, load_source
from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(
    current: Session,
    arguments: ConfigArguments = None,
    address: AddressOption = "127.0.0.1:8080",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without TLS and without a list of allowed keys, on any address.")
    ] = False,
) -> None:
    """Lead a federation: gather clients, run the rounds, and give every client the tuned model."""
    source = load_source(arguments)
    with current.federation_reporter() as reporter:
        from fedrag_cli.commands.serve import serve

        summary = serve(source, reporter, command=current.command_line, address=address, insecure=insecure)
    current.run_result(summary)
