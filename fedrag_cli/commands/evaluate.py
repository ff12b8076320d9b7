"""`fedrag evaluate`: measuring a config's RAG system, or a run's tuned one, in a run directory of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.commands.job import (
    RunData,
    RunReporter,
    chosen_metrics,
    data_fingerprints,
    evaluate_once,
    life_cycle,
    load_questions,
    model_fingerprints,
    record_fingerprints,
    require_unchanged,
)
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.fields import generator_metrics_of
from fedrag_cli.config.validation import require_evaluation_split
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.build import build_rag_system, build_rag_system_without_passages, with_tuned_models
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.reports.plots import plot_evaluation
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.metrics_log import seconds_spent
from fedrag_cli.runs.reporter import Reporter

STAGE = "evaluated"


def start_evaluation(
    source: ConfigSource, evaluated_run: Path | None, *, command: Sequence[str], reporter: Reporter
) -> dict[str, Any]:
    """Evaluate the RAG system of a config, or the tuned one of a run, on the config's evaluation split.

    Args:
        source: A loaded config; that of the run where one is evaluated.
        evaluated_run: The run directory whose tuned models are measured; None for the config's own.
        command: The command line, for the manifest.
        reporter: Shows the progress.

    Returns:
        The summary, as `summary.json` has it: the split, each metric with its interval, groups, and what was cut.

    Raises:
        ConfigError: There is no split to evaluate on, or a metric needs a generator that is not there.
        FedRAGError: Data or a model is missing or bad.
    """
    config = _config_of(source, evaluated_run)
    data, metrics = _load(config)
    name = f"{config.run.name}-evaluation"
    of = str(evaluated_run.resolve()) if evaluated_run is not None else None
    with terminable():
        run = RunDirectory.create(
            config.run.output_dir,
            name,
            source.to_yaml(),
            command=command,
            seed=config.run.seed,
            outside=source.outside_values(),
            evaluation={"of": of},
        )
        try:
            with life_cycle(run, is_new=True):
                reporter.note(f"Run directory: {run.path}")
                rag_system = _build(config, data, metrics, reporter)
                return _see_through(run, config, data, metrics, rag_system, reporter)
        except KnowledgeStoreError:
            # Passages that a store leaves on disk turn out to be damaged when they are read, before anything is kept.
            if run.path.exists():
                run.remove()
            raise


def resume_evaluation(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with an evaluation after its newest batch; see `start_evaluation`."""
    of = run.manifest()["evaluation"]["of"]
    config = _config_of(source, Path(of) if of is not None else None)
    with life_cycle(run):
        data, metrics = _load(config)
        require_unchanged(run, "data", data_fingerprints(data))
        rag_system = _build(config, data, metrics, reporter)
        require_unchanged(run, "base models", model_fingerprints(rag_system))
        return _see_through(run, config, data, metrics, rag_system, reporter)


def _config_of(source: ConfigSource, evaluated_run: Path | None) -> Config:
    return with_tuned_models(source.config, RunDirectory.open(evaluated_run)) if evaluated_run else source.config


def _load(config: Config) -> tuple[RunData, list[str]]:
    split = require_evaluation_split(config)
    nodes = _passages(config)
    examples = load_questions(config, split)
    # Without a corpus nothing is retrieved, so the ids of passages name nothing.
    examples = resolve_relevant_ids(examples, nodes) if nodes else _without_relevant_ids(examples)
    data = RunData(nodes, [], [], examples[: config.evaluation.limit], split)
    return data, chosen_metrics(config, data)


def _passages(config: Config) -> list[KnowledgeNode]:
    if config.dataset.corpus is None and config.evaluation.context == "none":
        return []
    return load_corpus(config.dataset.corpus)


def _without_relevant_ids(examples: Sequence[Example]) -> list[Example]:
    return [dataclasses.replace(example, relevant_ids=()) for example in examples]


def _build(config: Config, data: RunData, metrics: Sequence[str], reporter: Reporter) -> RAGSystem:
    answering = bool(generator_metrics_of(metrics))
    if not data.nodes:
        return build_rag_system_without_passages(config, with_generator=answering, reporter=reporter)
    return build_rag_system(
        config,
        nodes=data.nodes,
        fingerprint=data.corpus_fingerprint,
        with_generator=answering,
        reporter=reporter,
    )


def _see_through(
    run: RunDirectory,
    config: Config,
    data: RunData,
    metrics: Sequence[str],
    rag_system: RAGSystem,
    reporter: Reporter,
) -> dict[str, Any]:
    reporter = RunReporter(run.open_log(), reporter)
    # A run that goes on counts what its earlier parts have taken.
    started = time.monotonic() - seconds_spent(run.events())
    record_fingerprints(run, rag_system, data)
    reporter.event("started", mode="evaluation", **data.counts())
    evaluation = evaluate_once(run, STAGE, config, data, rag_system, metrics, reporter)
    assert evaluation is not None
    summary = _summary(run, config, data, evaluation, time.monotonic() - started)
    plot_evaluation(summary, run.plots / "metrics.png")
    run.write_json("summary.json", summary)
    run.update_manifest(status="done", error=None)
    return summary


def _summary(
    run: RunDirectory, config: Config, data: RunData, evaluation: Evaluation, seconds: float
) -> dict[str, Any]:
    settings, seed, manifest = config.evaluation, config.run.seed, run.manifest()
    groups = {
        group: {name: dataclasses.asdict(interval) for name, interval in intervals.items()}
        for group, intervals in evaluation.group_intervals(settings, seed).items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": manifest["run"],
        "run_dir": str(run.path),
        "status": "done",
        "role": "evaluation",
        "evaluated": manifest["evaluation"]["of"],
        "seed": seed,
        "command": manifest["command"],
        "data": data.counts(),
        "fingerprints": manifest["fingerprints"],
        "split": data.split,
        "context": settings.context,
        "inference": config.rag_system.inference,
        "n": evaluation.n,
        "confidence": settings.confidence,
        "metrics": {name: dataclasses.asdict(item) for name, item in evaluation.intervals(settings, seed).items()},
        "group_by": settings.group_by,
        "groups": groups,
        "truncated": evaluation.truncated,
        "lengths": [item.to_dict() for item in evaluation.lengths],
        "predictions": str(run.path / "evaluation" / f"{STAGE}-predictions.jsonl"),
        "seconds": seconds,
        "versions": manifest["versions"],
    }
