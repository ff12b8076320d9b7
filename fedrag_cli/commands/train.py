"""`fedrag train`: baseline evaluation, training, evaluation, and all that goes into the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.commands.job import Job, open_job, save_models
from fedrag_cli.commands.run_data import RunData, chosen_metrics, load_rag_system, load_run_data, measured_lengths
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.validation import require_training
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.baselines import compare_to_baselines
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.rag.models import choose_device
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.processes import Processes, join_processes, process_count
from fedrag_cli.runs.reporter import Reporter, SilentReporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainers.base import TrainResult


def train(
    source: ConfigSource, reporter: Reporter, *, command: Sequence[str] = (), run: RunDirectory | None = None
) -> dict[str, Any]:
    """Start a new training, or go on with one, and see it through.

    Args:
        source: A loaded config.
        reporter: Shows what happens.
        command: The command line of a new run, for the manifest.
        run: The run that goes on, to the numbers that an undisturbed one would have ended with.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: Anything fails; what is wrong with config, data or models leaves no new run directory behind.
    """
    config = source.config
    require_training(config)
    _require_shared_store(config)
    processes = join_processes(lambda: choose_device(config.run.device))
    with processes.failures_shared():
        if not processes.is_rank_0:
            with terminable(once=True):
                return _follow(config, processes)
        # What another process has failed of is told before the run writes down how it ended.
        with open_job(source, reporter, run, command=command) as job, processes.failures_shared():
            return _train(job, processes)


def _require_shared_store(config: Config) -> None:
    what = config.rag_system.knowledge_store.one_process
    if process_count() > 1 and what is not None:
        raise ConfigError(
            f"{what} for one process, but {process_count()} were started.",
            "Use a Qdrant server (rag_system.knowledge_store.url), another type of store, or one process.",
        )


def _follow(config: Config, processes: Processes) -> dict[str, Any]:
    """Take part in the steps of a training that rank 0 starts, evaluates and saves."""
    checkpoints: Path = processes.receive()
    data = load_run_data(config)
    reporter = SilentReporter()
    rag_system = load_rag_system(config, data, reporter)
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation, reporter=reporter)
    manager.train(checkpoints)
    summary: dict[str, Any] = processes.receive()
    return summary


def _train(job: Job, processes: Processes) -> dict[str, Any]:
    run, config = job.run, job.config
    data = load_run_data(config)
    chosen_metrics(config, data)
    rag_system = job.load(lambda: load_rag_system(config, data, job.reporter), data)
    processes.run_on_rank_0(lambda: run.checkpoints)
    # Before the first evaluation, so that what cannot be trained is told before anything is computed.
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation, reporter=job.reporter)
    job.reporter.event("started", mode=config.trainer.mode, processes=processes.count, **data.counts())
    before = job.evaluate("before", data, rag_system)
    untuned = job.evaluate_baselines(data, rag_system)
    result = manager.train(run.checkpoints)
    after = job.evaluate("after", data, rag_system)
    save_models(run, rag_system, config)
    summary = job.tuning_summary(
        data,
        before,
        after,
        loss=result.loss,
        phases=_phases(result),
        kept=_kept(run),
        untuned=compare_to_baselines(untuned, after, config.evaluation, config.run.seed),
        steps=result.steps,
        metrics=result.metrics,
        truncated=_truncated(result, after),
        lengths=[item.to_dict() for item in _lengths(data, rag_system, result, after)],
        processes=processes.count,
    )
    job.finish_tuning(summary)
    return processes.run_on_rank_0(lambda: summary)


def _phases(result: TrainResult) -> dict[str, dict[str, float]]:
    """Return mean loss and steps of each phase of an alternating training; nothing for another."""
    parts = {name: part for name, part in result.metrics.items() if isinstance(part, dict) and "steps" in part}
    return {name: {"loss": part["loss"], "steps": part["steps"]} for name, part in parts.items()}


def _kept(run: RunDirectory) -> list[dict[str, Any]]:
    """Return which step's weights each phase has kept, and how good they were on the validation data."""
    # A phase that was resumed at its end tells it again.
    kept = {event["phase"]: event for event in run.events() if event["event"] == "kept"}
    return [{name: event[name] for name in ("phase", "step", "metric", "value")} for event in kept.values()]


def _truncated(result: TrainResult, after: Evaluation | None) -> dict[str, int]:
    """Return what was cut in training (in all phases) and in the evaluation after it."""
    truncated = {f"evaluation {name}": count for name, count in (after.truncated if after else {}).items()}
    return truncated | {kind: counts["truncated"] for kind, counts in _prompt_counts(result).items()}


def _lengths(data: RunData, rag_system: RAGSystem, result: TrainResult, after: Evaluation | None) -> list[Lengths]:
    """Return how much of all texts and prompts the models' limits cut off."""
    found = [*measured_lengths(rag_system, data), *(after.lengths if after else ())]
    counted = _prompt_counts(result)
    return [*found, *(rag_system.require_generator().measure(kind, counts) for kind, counts in counted.items())]


def _prompt_counts(result: TrainResult) -> dict[str, dict[str, int]]:
    """Return what was counted of the prompts of all phases, by their kind."""
    counted: dict[str, dict[str, int]] = {}
    phases = [result.metrics, *(phase for phase in result.metrics.values() if isinstance(phase, dict))]
    for phase in phases:
        for name, kind in (("scoring", "scored prompts"), ("prompts", "training prompts")):
            if isinstance(phase.get(name), dict):
                total = counted.setdefault(kind, dict.fromkeys(phase[name], 0))
                counted[kind] = {key: total[key] + int(count) for key, count in phase[name].items()}
    return counted
