"""Evaluating a config's RAG system, or a run's tuned one, on a split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fedrag_cli.config import Config
from fedrag_cli.config.checks import ANSWER_METRICS, evaluation_split, require_generator, tuned_sides
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import load_examples
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.evaluator import choose_metrics, evaluate
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.runs.reporting import Reporter


def evaluate_config(config: Config, reporter: Reporter, predictions: Path | None = None) -> dict[str, Any]:
    """Evaluate the RAG system of a config on its evaluation split.

    Args:
        config: A loaded config; that of a run points at the tuned models.
        reporter: Shows the progress.
        predictions: File for one JSON line a question, with passages, answer and metrics.

    Returns:
        The split, n, each metric with its interval, and what was truncated.

    Raises:
        ConfigError: There is no split to evaluate on, or a metric needs a generator that is not there.
    """
    split = evaluation_split(config)
    if split is None:
        raise ConfigError(
            "The config has neither dataset.test nor dataset.validation to evaluate on.", "Add one of them."
        )
    nodes = load_corpus(config.dataset.corpus)
    examples = resolve_relevant_ids(load_examples(getattr(config.dataset, split)), nodes)[: config.evaluation.limit]
    metrics = choose_metrics(config.evaluation.metrics, tuned_sides(config), examples)
    answering = any(name in ANSWER_METRICS for name in metrics)
    if answering:
        require_generator(config, "computing exact_match and f1")
    rag_system = build_rag_system(config, nodes=nodes, with_generator=answering, reporter=reporter)
    evaluation = evaluate(rag_system, examples, metrics, depth=config.evaluation.depth, reporter=reporter)
    if predictions is not None:
        evaluation.write_predictions(predictions)
    intervals = evaluation.intervals(config.evaluation, config.run.seed)
    return {
        "split": split,
        "n": evaluation.n,
        "confidence": config.evaluation.confidence,
        "metrics": {name: dataclasses.asdict(interval) for name, interval in intervals.items()},
        "truncated": evaluation.truncated,
    }
