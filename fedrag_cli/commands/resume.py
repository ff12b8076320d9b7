"""`fedrag resume`: take any run up again, from its directory alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fedrag_cli.config import ConfigSource
from fedrag_cli.errors import ConfigError, DataError, RunInterruptedError
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.processes import process_count, resume_command
from fedrag_cli.runs.reporter import Reporter

COMMANDS = {"evaluation": "evaluate", "server": "serve", "client": "join", "simulation": "simulate"}
"""What goes on with a run of a role, as module and function are called; all others are trainings."""


def resume_run(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run: a training, an evaluation, or a server, a client or a simulation of a federation.

    Returns:
        The summary; that of a finished run as it is, but for where the run is now.

    Raises:
        ConfigError: The environment gives settings other values than when the run started.
        DataError: The run is finished, but what it has tuned is gone.
        RunInterruptedError: The user or a signal interrupted it; it can go on again.
    """
    role = run.role()
    # A server whose clients did not all get the final model serves on.
    if run.manifest().get("status") == "done" and not (role == "server" and run.summary().get("missing")):
        if missing := run.missing_models():
            raise DataError(
                f"The run in '{run.path}' is finished, but its tuned models are gone: {', '.join(missing)}.",
                "Put them back from a copy, or train again with the run's config.yaml.",
            )
        reporter.note(f"The run in {run.path} is finished already.")
        return run.summary()
    try:
        with terminable(once=process_count() > 1):
            run.require_same_outside(source.outside_values())
            if process_count() > 1 and role is not None:
                raise ConfigError(
                    f"Only a training runs in several processes, but {process_count()} were started for '{run.path}'.",
                    f"Start it without a launcher: fedrag resume {run.path}",
                )
            # Each needs libraries that the others can do without.
            name = COMMANDS.get(role or "", "train")
            module = importlib.import_module(f"fedrag_cli.commands.{name}")
            command: Callable[..., dict[str, Any]] = getattr(module, name)
            return command(source, reporter, run=run)
    except KeyboardInterrupt as error:
        # While it works, a run says by itself what it has saved.
        raise RunInterruptedError(
            "Interrupted before the run went on; it is as it was.", f"Go on with: {resume_command(run.path)}"
        ) from error
