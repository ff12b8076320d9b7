"""`fedrag resume`: take any run up again, from its directory alone."""

from __future__ import annotations

from typing import Any

from fedrag_cli.config import ConfigSource
from fedrag_cli.errors import ConfigError, DataError, RunInterruptedError
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.launch import process_count, resume_command
from fedrag_cli.runs.reporter import Reporter


def _is_server(run: RunDirectory) -> bool:
    return run.federation_role() == "server"


def resume_run(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run: a training, an evaluation, or a server, a client or a simulation of a federation.

    Args:
        run: The run directory.
        source: Its config.
        reporter: Shows what happens.

    Returns:
        The summary; that of a finished run as it is, but for where the run is now.

    Raises:
        ConfigError: The environment gives settings other values than when the run started.
        DataError: The run is finished, but what it has tuned is gone.
        RunInterruptedError: The user or a signal interrupted it; it can go on again.
    """
    if run.manifest().get("status") == "done" and not (run.summary().get("missing") and _is_server(run)):
        if missing := run.missing_models():
            raise DataError(
                f"The run in '{run.path}' is finished, but its tuned models are gone: {', '.join(missing)}.",
                "Put them back from a copy, or train again with the run's config.yaml.",
            )
        reporter.note(f"The run in {run.path} is finished already.")
        return run.summary()
    try:
        with terminable(once=process_count() > 1):
            return _go_on(run, source, reporter)
    except KeyboardInterrupt as error:
        # While it works, a run says by itself what it has saved.
        raise RunInterruptedError(
            "Interrupted before the run went on; it is as it was.", f"Go on with: {resume_command(run.path)}"
        ) from error


def _go_on(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    run.require_same_outside(source.outside_values())
    of_training = run.manifest().get("evaluation") is None and run.federation_role() is None
    if process_count() > 1 and not of_training:
        raise ConfigError(
            f"Only a training runs in several processes, but {process_count()} were started for '{run.path}'.",
            f"Start it without a launcher: fedrag resume {run.path}",
        )
    if run.manifest().get("evaluation") is not None:
        from fedrag_cli.commands.evaluate import evaluate

        return evaluate(source, reporter, run=run)
    role = run.federation_role()
    if role == "server":
        from fedrag_cli.commands.serve import serve

        return serve(source, reporter, run=run)
    if role == "client":
        from fedrag_cli.commands.join import join

        return join(source, reporter, run=run)
    if role == "simulation":
        from fedrag_cli.commands.simulate import simulate

        return simulate(source, reporter, run=run)
    from fedrag_cli.commands.train import train

    return train(source, reporter, run=run)
