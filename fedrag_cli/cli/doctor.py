"""`fedrag doctor`: versions, devices and packages."""

from __future__ import annotations

from typing import Any

import typer

from fedrag_cli.cli.options import JsonOption, QuietOption, VerboseOption
from fedrag_cli.cli.session import session


def command(json: JsonOption = False, quiet: QuietOption = False, verbose: VerboseOption = False) -> None:
    """Check the installed libraries and say what this machine can compute on; exits with 1 if something is wrong."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        from fedrag_cli.runs.installation import examine

        report: dict[str, Any] = examine()
        current.result(report, lambda renderer: renderer.installation(report))
        if not report["healthy"]:
            raise typer.Exit(1)
