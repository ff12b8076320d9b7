"""`fedrag evaluate`: metrics with intervals of a config or of a run, kept in a run directory that `resume` takes up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.commands.job import Job, open_job
from fedrag_cli.commands.run_data import RunData, chosen_metrics, load_questions
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.fields import generator_metrics_of
from fedrag_cli.config.validation import require_evaluation_split
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.build import build_rag_system, build_rag_system_without_passages
from fedrag_cli.rag.from_run import with_tuned_models
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.reports.interval_plots import plot_evaluation
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporter import Reporter

STAGE = "evaluated"


def evaluate(
    source: ConfigSource,
    reporter: Reporter,
    evaluated_run: Path | None = None,
    *,
    command: Sequence[str] = (),
    run: RunDirectory | None = None,
) -> dict[str, Any]:
    """Evaluate the RAG system of a config, or the tuned one of a run, on the config's evaluation split.

    Args:
        source: A loaded config; that of the run where one is evaluated.
        reporter: Shows the progress.
        evaluated_run: The run directory whose tuned models are measured; None for the config's own.
        command: The command line of a new evaluation, for the manifest.
        run: The evaluation that goes on, after its newest batch.

    Returns:
        The summary, as `summary.json` has it: the split, each metric with its interval, groups, and what was cut.

    Raises:
        ConfigError: There is no split to evaluate on, or a metric needs a generator that is not there.
        FedRAGError: Data or a model is missing or bad.
    """
    of = str(evaluated_run.resolve()) if evaluated_run is not None else None
    if run is not None:
        of = run.manifest()["evaluation"]["of"]
    config = with_tuned_models(source.config, RunDirectory.open(Path(of))) if of is not None else source.config
    name = f"{config.run.name}-evaluation"
    try:
        with open_job(source, reporter, run, command=command, name=name, evaluation={"of": of}) as job:
            data, metrics = _load(config)
            rag_system = job.load(lambda: _build(config, data, metrics, job.reporter), data)
            job.reporter.event("started", mode="evaluation", **data.counts())
            evaluation = job.evaluate(STAGE, data, rag_system)
            assert evaluation is not None
            summary = _summary(job, data, evaluation, of)
            plot_evaluation(summary, job.run.plots / "metrics.png")
            job.finish(summary)
            return summary
    except KnowledgeStoreError:
        # Passages that a store leaves on disk turn out to be damaged when they are read, before anything is kept.
        if job.is_new and job.run.path.exists():
            job.run.remove()
        raise


def _load(config: Config) -> tuple[RunData, list[str]]:
    split = require_evaluation_split(config)
    without_corpus = config.dataset.corpus is None and config.evaluation.context == "none"
    nodes = [] if without_corpus else load_corpus(config.dataset.corpus)
    examples = load_questions(config, split)
    # Without a corpus nothing is retrieved, so the ids of passages name nothing.
    examples = (
        resolve_relevant_ids(examples, nodes)
        if nodes
        else [dataclasses.replace(example, relevant_ids=()) for example in examples]
    )
    data = RunData(nodes, [], [], examples[: config.evaluation.limit], split)
    return data, chosen_metrics(config, data)


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


def _summary(job: Job, data: RunData, evaluation: Evaluation, of: str | None) -> dict[str, Any]:
    settings, seed = job.config.evaluation, job.config.run.seed
    groups = {
        group: {name: dataclasses.asdict(interval) for name, interval in intervals.items()}
        for group, intervals in evaluation.group_intervals(settings, seed).items()
    }
    return job.summary(
        data,
        role="evaluation",
        evaluated=of,
        context=settings.context,
        inference=job.config.rag_system.inference,
        n=evaluation.n,
        confidence=settings.confidence,
        metrics={name: dataclasses.asdict(item) for name, item in evaluation.intervals(settings, seed).items()},
        group_by=settings.group_by,
        groups=groups,
        truncated=evaluation.truncated,
        lengths=[item.to_dict() for item in evaluation.lengths],
        predictions=str(job.run.path / "evaluation" / f"{STAGE}-predictions.jsonl"),
    )
