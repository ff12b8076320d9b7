"""`fedrag join-fl`: one client of a federation."""

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
    insecure: Annotated[bool, typer.Option("--insecure", help="Do without TLS, to any address.")] = False,
) -> None:
    """Take part in a federation: train on this machine's data, send tuned weights only, keep the final model."""
    source = load_source(arguments)
    from fedrag_cli.commands.join import join

    summary = join(source, current.reporter(), command=current.command_line, address=address, insecure=insecure)
    current.run_result(summary)
