"""`fedrag schema`: the config's JSON Schema, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import VerboseOption
from fedrag_cli.cli.session import session, write_json


def command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file; stdout by default.")
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Print the JSON Schema of the config, registered components included."""
    with session(json_output=False, quiet=False, verbose=verbose):
        from fedrag_cli.config.json_schema import config_json_schema

        if output is None:
            write_json(config_json_schema())
        else:
            from fedrag_cli.runs.files import write_json_atomically

            write_json_atomically(output, config_json_schema())
