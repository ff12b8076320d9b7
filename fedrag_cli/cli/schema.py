"""`fedrag schema`: the config's JSON Schema, for editors."""

from __future__ import annotations

import json as json_library
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import VerboseOption
from fedrag_cli.cli.session import session


def command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file; stdout by default.")
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Print the JSON Schema of the config, registered components included."""
    with session(json_output=False, quiet=False, verbose=verbose):
        from fedrag_cli.config.json_schema import config_json_schema

        text = json_library.dumps(config_json_schema(), indent=2, ensure_ascii=False) + "\n"
        if output is None:
            sys.stdout.write(text)
        else:
            from fedrag_cli.runs.atomic import write_text_atomically

            write_text_atomically(output, text)
