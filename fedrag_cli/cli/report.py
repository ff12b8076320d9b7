"""`fedrag report`: one HTML file that says whether runs are better, by how much, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedrag_cli.cli.options import ConfidenceOption
from fedrag_cli.cli.session import Session, in_session

if TYPE_CHECKING:
    from fedrag_cli.cli.render import Renderer


@in_session()
def command(
    current: Session,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run directories, as for compare: the first is compared with, and a single training run with itself "
            "before training. RUN:STAGE names another of its evaluations.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Show so many questions won and lost for each metric.")
    ] = 10,
    confidence: ConfidenceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is no report of fedrag.")] = False,
) -> None:
    """Write a report of runs as one HTML file: verdicts, metrics, settings, curves, questions won and lost."""
    from fedrag_cli.reports.html import require_replaceable, write_report

    require_replaceable(output, force=force)
    written = write_report(runs, output, confidence, examples)

    def show(renderer: Renderer) -> None:
        for item in written["verdicts"]:
            renderer.line(item["verdict"])
        renderer.written([output], "Open it in a browser: all of it is in this one file.")

    current.result(written, show)
