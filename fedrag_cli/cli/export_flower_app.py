"""`fedrag export-flower-app`: the federation as an app for stock Flower deployments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import load_source
from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(
    current: Session,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; nothing is overwritten.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="YAML file (fedrag.yaml by default), and settings."),
    ] = None,
) -> None:
    """Write a Flower app that a stock SuperLink and SuperNodes run; each node names its own config."""
    source = load_source(arguments)
    from fedrag_cli.commands.export import export_flower_app

    written = export_flower_app(source, directory)
    current.result(
        {"directory": str(directory), "files": [str(path) for path in written]},
        lambda renderer: renderer.written(
            written,
            "Where fedrag is installed, start flower-superlink --disable-runtime-dependency-installation and "
            "flower-supernode --node-config 'config=\"/path/to/their.yaml\"', and run it with: "
            f"flwr run {directory} SUPERLINK",
        ),
    )
