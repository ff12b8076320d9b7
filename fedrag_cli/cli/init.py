"""`fedrag init`: a config to start from, with its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.session import Session, in_session

# What comes next where it is not training on one machine.
NEXT = {"federated": "fedrag simulate --clients 3"}


@in_session()
def command(
    current: Session,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; it is made where it is missing.")
    ],
    template: Annotated[str, typer.Option("--template", "-t", help="Which config to start from.")] = "quickstart",
) -> None:
    """Write fedrag.yaml, its schema and its data into a folder; nothing is overwritten."""
    from fedrag_cli.config.templates import write_template

    written = write_template(template, directory)
    next_step = f"Next: cd {directory} && {NEXT.get(template, 'fedrag train')}"
    document = {"template": template, "files": [str(path) for path in written]}
    current.result(document, lambda renderer: renderer.written(written, next_step))
