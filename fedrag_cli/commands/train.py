"""A whole training run: baseline evaluation, training, evaluation, and all that goes into the run directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedrag_cli.commands.job import (
    RunData,
    RunReporter,
    chosen_metrics,
    data_fingerprints,
    differences_of,
    evaluate_once,
    life_cycle,
    load_rag_system,
    load_run_data,
    measured_lengths,
    model_fingerprints,
    record_fingerprints,
    require_unchanged,
    save_models,
    tuned_models,
    write_results,
)
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.validation import require_training, tuned_sides
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.rag.models import choose_device
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.launch import process_count
from fedrag_cli.runs.metrics_log import seconds_spent
from fedrag_cli.runs.processes import Processes, join_processes
from fedrag_cli.runs.reporter import Reporter, SilentReporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainer_managers.huggingface import HuggingFaceRAGTrainerManager
from fedrag_cli.trainers.base import TrainResult


def start_training(source: ConfigSource, command: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Start a new run from a config and see it through.

    Args:
        source: A loaded config.
        command: The command line, for the manifest.
        reporter: Shows what happens.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: Anything fails; what is wrong with config, data or models leaves no run directory behind.
    """
    config = source.config
    require_training(config)
    _require_shared_store(config)
    processes = join_processes(lambda: choose_device(config.run.device))
    with terminable(once=processes.count > 1), processes.failures_told():
        return _start(source, command, reporter, processes) if processes.is_rank_0 else _follow(config, processes)


def _start(source: ConfigSource, command: Sequence[str], reporter: Reporter, processes: Processes) -> dict[str, Any]:
    config = source.config
    data = load_run_data(config)
    chosen_metrics(config, data)
    run = RunDirectory.create(
        config.run.output_dir,
        config.run.name,
        source.to_yaml(),
        command=command,
        seed=config.run.seed,
        outside=source.outside_values(),
    )
    with life_cycle(run, is_new=True):
        reporter.note(f"Run directory: {run.path}")
        rag_system = load_rag_system(config, data, reporter)
        return _see_through(run, config, data, rag_system, reporter, processes)


def resume_training(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run from its directory alone.

    Args:
        run: The run directory.
        source: Its config.
        reporter: Shows what happens.

    Returns:
        The summary, with the numbers that an undisturbed run would have ended with.
    """
    config = source.config
    _require_shared_store(config)
    processes = join_processes(lambda: choose_device(config.run.device))
    with terminable(once=processes.count > 1), processes.failures_told():
        return _resume(run, config, reporter, processes) if processes.is_rank_0 else _follow(config, processes)


def _resume(run: RunDirectory, config: Config, reporter: Reporter, processes: Processes) -> dict[str, Any]:
    with life_cycle(run):
        data = load_run_data(config)
        require_unchanged(run, "data", data_fingerprints(data))
        rag_system = load_rag_system(config, data, reporter)
        require_unchanged(run, "base models", model_fingerprints(rag_system))
        return _see_through(run, config, data, rag_system, reporter, processes)


def _require_shared_store(config: Config) -> None:
    store = config.rag_system.knowledge_store
    if process_count() > 1 and store.type == "qdrant" and store.path is not None:
        raise ConfigError(
            f"Qdrant opens the folder '{store.path}' for one process, but {process_count()} were started.",
            "Use a Qdrant server (rag_system.knowledge_store.url), another type of store, or one process.",
        )


def _follow(config: Config, processes: Processes) -> dict[str, Any]:
    """Take part in the steps of a training that another process starts, evaluates and saves."""
    checkpoints: Path = processes.receive()
    data = load_run_data(config)
    reporter = SilentReporter()
    rag_system = load_rag_system(config, data, reporter)
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation, reporter=reporter)
    manager.train(checkpoints)
    summary: dict[str, Any] = processes.receive()
    return summary


def _see_through(
    run: RunDirectory,
    config: Config,
    data: RunData,
    rag_system: RAGSystem,
    reporter: Reporter,
    processes: Processes,
) -> dict[str, Any]:
    reporter = RunReporter(run.open_log(), reporter)
    # A run that goes on counts what its earlier parts have taken.
    started = time.monotonic() - seconds_spent(run.events())
    with processes.failures_told():
        processes.run_on_rank_0(lambda: run.checkpoints)
        record_fingerprints(run, rag_system, data)
        # Before the first evaluation, so that what cannot be trained is told before anything is computed.
        manager = build_manager(config, rag_system, train=data.train, validation=data.validation, reporter=reporter)
        reporter.event("started", mode=config.trainer.mode, processes=processes.count, **data.counts())
        metrics = chosen_metrics(config, data)
        before = evaluate_once(run, "before", config, data, rag_system, metrics, reporter)
        result = manager.train(run.checkpoints)
        after = evaluate_once(run, "after", config, data, rag_system, metrics, reporter)
        save_models(run, rag_system, config)
        summary = _summary(run, config, data, rag_system, manager, result, before, after, time.monotonic() - started)
        summary["processes"] = processes.count
        write_results(run, summary)
        return processes.run_on_rank_0(lambda: summary)


def _summary(
    run: RunDirectory,
    config: Config,
    data: RunData,
    rag_system: RAGSystem,
    manager: HuggingFaceRAGTrainerManager,
    result: TrainResult,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> dict[str, Any]:
    differences = differences_of(config, before, after)
    manifest = run.manifest()
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": config.run.name,
        "run_dir": str(run.path),
        "status": "done",
        "mode": manager.mode,
        "seed": config.run.seed,
        "command": manifest["command"],
        "tuned": tuned_models(tuned_sides(config), stored),
        "data": data.counts(),
        "fingerprints": manifest["fingerprints"],
        "split": data.split,
        "differences": differences,
        "overlaps": [overlap.to_dict() for overlap in data.overlaps()],
        "loss": result.loss,
        "phases": _phases(result),
        "steps": result.steps,
        "metrics": result.metrics,
        "seconds": seconds,
        "settings": {side: stored["trainer"][side] for side in tuned_sides(config)},
        "truncated": _truncated(result, after),
        "lengths": [item.to_dict() for item in _lengths(data, rag_system, result, after)],
        "versions": manifest["versions"],
    }


def _phases(result: TrainResult) -> dict[str, dict[str, float]]:
    """Return mean loss and steps of each phase of an alternating training; nothing for another."""
    parts = {name: part for name, part in result.metrics.items() if isinstance(part, dict) and "steps" in part}
    return {name: {"loss": part["loss"], "steps": part["steps"]} for name, part in parts.items()}


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
