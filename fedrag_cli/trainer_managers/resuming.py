"""`fedrag resume`: take any run up again, from its directory alone."""

from __future__ import annotations

from typing import Any

from fedrag_cli.config import ConfigSource
from fedrag_cli.errors import ConfigError
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.launch import process_count
from fedrag_cli.runs.reporting import Reporter


def _is_server(run: RunDirectory) -> bool:
    return run.federation_role() == "server"


def resume_run(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run: a training, an evaluation, or a server, a client or a simulation of a federation.

    Args:
        run: The run directory.
        source: Its config.
        reporter: Shows what happens.

    Returns:
        The summary; that of a finished run as it is.
    """
    if run.manifest().get("status") == "done" and not (run.summary().get("missing") and _is_server(run)):
        reporter.note(f"The run in {run.path} is finished already.")
        return run.summary()
    of_training = run.manifest().get("evaluation") is None and run.federation_role() is None
    if process_count() > 1 and not of_training:
        raise ConfigError(
            f"Only a training runs in several processes, but {process_count()} were started for '{run.path}'.",
            f"Start it without a launcher: fedrag resume {run.path}",
        )
    if run.manifest().get("evaluation") is not None:
        from fedrag_cli.trainer_managers.evaluation_run import resume_evaluation

        return resume_evaluation(run, source, reporter)
    role = run.federation_role()
    if role == "server":
        from fedrag_cli.trainer_managers.serving import resume_serving

        return resume_serving(run, source, reporter)
    if role == "client":
        from fedrag_cli.trainer_managers.joining import resume_joining

        return resume_joining(run, source, reporter)
    if role == "simulation":
        from fedrag_cli.trainer_managers.simulation import resume_simulation

        return resume_simulation(run, source, reporter)
    from fedrag_cli.trainer_managers.training_run import resume_training

    return resume_training(run, source, reporter)
