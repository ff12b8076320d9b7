"""`fedrag doctor`: versions, devices and packages."""

from __future__ import annotations

from typing import Any

import typer

from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(current: Session) -> None:
    """Check the installed libraries and say what this machine can compute on; exits with 1 if something is wrong."""
    from fedrag_cli.runs.installation import examine

    report: dict[str, Any] = examine()
    current.result(report, lambda renderer: renderer.installation(report))
    if not report["healthy"]:
        raise typer.Exit(1)
