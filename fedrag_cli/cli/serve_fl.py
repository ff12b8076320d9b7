"""`fedrag serve-fl`: the server of a federation."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fedrag_cli.cli.options import (
    AddressOption,
    ConfigArguments,
    JsonOption,
    QuietOption,
    VerboseOption,
    sort_arguments,
)
from fedrag_cli.cli.session import session


def command(
    arguments: ConfigArguments = None,
    address: AddressOption = "127.0.0.1:8080",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without TLS and without a list of allowed keys, on any address.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Lead a federation: gather clients, run the rounds, and give every client the tuned model."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.config import load_config_with_source

        given = sort_arguments(arguments)
        source = load_config_with_source(given.path, given.overrides)
        with current.federation_reporter() as reporter:
            from fedrag_cli.commands.serve import serve

            summary = serve(source, reporter, command=["fedrag", *sys.argv[1:]], address=address, insecure=insecure)
        current.result(summary, lambda renderer: renderer.federation_summary(summary))
