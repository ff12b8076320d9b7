"""`fedrag resume`: go on where a run stopped, from its directory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.session import Session, in_session


@in_session(in_processes=True)
def command(
    current: Session,
    run_dir: Annotated[Path, typer.Argument(help="The run directory, such as runs/NAME/TIME-ID.")],
) -> None:
    """Go on with an interrupted run; it ends with the numbers that it would have had undisturbed."""
    from fedrag_cli.config import load_config_with_source
    from fedrag_cli.runs.directory import RunDirectory

    run = RunDirectory.open(run_dir)
    source = load_config_with_source(run.config_file)
    with current.federation_reporter(live=run.role() in ("server", "simulation")) as reporter:
        from fedrag_cli.commands.resume import resume_run

        summary = resume_run(run, source, reporter)
    current.run_result(summary)
