"""Evaluating a RAG system on questions: rankings against relevant ids, answers against accepted answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.config.checks import ANSWER_METRICS
from fedrag_cli.data.examples import Example
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.answers import exact_match, f1
from fedrag_cli.evaluation.bootstrap import Interval, bootstrap_interval
from fedrag_cli.evaluation.ranking import ranking_metrics
from fedrag_cli.rag.knowledge_stores.base import ScoredNode
from fedrag_cli.rag.system import RAGSystem, count_truncation
from fedrag_cli.runs.atomic import write_text_atomically
from fedrag_cli.runs.reporting import Reporter, SilentReporter

RANKING_METRICS = ("mrr", "recall@1", "recall@5", "ndcg@10")
_ANSWER_FUNCTIONS = {"exact_match": exact_match, "f1": f1}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation.

    Args:
        n: Number of questions.
        values: For each metric its value for each question that it applies to, in the order of the questions.
        predictions: A record for each question.
        truncated: How many queries and prompts were cut.
    """

    n: int
    values: dict[str, list[float]]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)

    def intervals(self, settings: EvaluationConfig, seed: int) -> dict[str, Interval]:
        """Return the mean of each metric with its bootstrap interval."""
        return {
            name: bootstrap_interval(values, settings.confidence, settings.resamples, seed)
            for name, values in self.values.items()
        }

    def means(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: sum(values) / len(values) for name, values in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return all but the predictions as plain values."""
        return {"n": self.n, "values": self.values, "truncated": self.truncated}

    def write_predictions(self, path: Path) -> None:
        """Write the predictions, a JSON line a question."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
        write_text_atomically(path, lines)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """Make an evaluation of what `to_dict` gave."""
        return cls(values["n"], values["values"], [], values["truncated"])


def choose_metrics(wanted: Sequence[str] | None, sides: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """Return the metrics to compute.

    Args:
        wanted: The config's metrics; None takes those of the sides.
        sides: The sides that are tuned or looked at: retriever, generator.
        examples: The questions; without relevant ids a retriever is measured by its answers.

    Raises:
        DataError: A ranking metric is wanted but no example has relevant ids.
    """
    judged = any(example.relevant_ids for example in examples)
    if wanted is None:
        ranking = RANKING_METRICS if "retriever" in sides and judged else ()
        answers = ANSWER_METRICS if "generator" in sides or not judged else ()
        return [*ranking, *answers]
    unjudged = [name for name in wanted if name not in ANSWER_METRICS]
    if unjudged and not judged:
        raise DataError(
            f"{', '.join(unjudged)} need relevant ids, but no example has any.",
            "Add a relevant_ids column (columns.relevant_ids names it), or set evaluation.metrics: [exact_match, f1].",
        )
    return list(wanted)


def evaluate(
    rag_system: RAGSystem,
    examples: Sequence[Example],
    metrics: Sequence[str],
    *,
    depth: int = 100,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Retrieve and, where a metric needs it, answer; then compare.

    Args:
        rag_system: What to evaluate, as it is.
        examples: Questions with accepted answers and relevant ids; relevant ids name passages of the store.
        metrics: Names as in the config.
        depth: Length of the rankings.
        reporter: Shows the progress.

    Raises:
        DataError: A metric has no question that it applies to.
    """
    reporter = reporter or SilentReporter()
    queries = [example.query for example in examples]
    passages = len(rag_system.knowledge_store)
    cutoffs = [int(name.partition("@")[2]) for name in metrics if "@" in name]
    with reporter.task("Retrieving", len(queries), "question") as advance:
        found = rag_system.batch_retrieve(queries, min(max(depth, rag_system.top_k, *cutoffs), passages), advance)
    predictions = [_prediction(example, row[: rag_system.top_k]) for example, row in zip(examples, found, strict=True)]
    truncated = {"queries": rag_system.retriever.count_truncated(queries, queries=True)}
    values: dict[str, list[float]] = {}
    ranking = [name for name in metrics if name not in ANSWER_METRICS]
    if ranking:
        values |= _ranking_values(examples, found, ranking, max(depth, rag_system.top_k), predictions)
    answering = [name for name in metrics if name in ANSWER_METRICS]
    if answering:
        sources = [row[: rag_system.top_k] for row in found]
        with reporter.task("Answering", len(queries), "question") as advance:
            answers = rag_system.answer(queries, sources, advance)
        truncated["prompts"] = count_truncation(answers).truncated
        values |= _answer_values(examples, [answer.text for answer in answers], answering, predictions)
    return Evaluation(len(examples), values, predictions, truncated)


def _prediction(example: Example, passages: Sequence[ScoredNode]) -> dict[str, Any]:
    return {
        "id": example.id,
        "query": example.query,
        "passages": [{"id": scored.node.id, "score": scored.score} for scored in passages],
        "accepted": list(example.responses),
        "relevant_ids": list(example.relevant_ids),
        "metrics": {},
    }


def _ranking_values(
    examples: Sequence[Example],
    found: Sequence[list[ScoredNode]],
    names: Sequence[str],
    depth: int,
    predictions: list[dict[str, Any]],
) -> dict[str, list[float]]:
    judged = [position for position, example in enumerate(examples) if example.relevant_ids]
    if not judged:
        raise DataError(f"{', '.join(names)} need relevant ids, but no example has any.")
    rankings = [[scored.node.id for scored in found[position]] for position in judged]
    relevant = [examples[position].relevant_ids for position in judged]
    values = ranking_metrics(rankings, relevant, [name for name in names if name != "mrr"])
    if "mrr" in names:
        values = ranking_metrics([ranking[:depth] for ranking in rankings], relevant, ["mrr"]) | values
    for name, row in values.items():
        for position, value in zip(judged, row, strict=True):
            predictions[position]["metrics"][name] = value
    return values


def _answer_values(
    examples: Sequence[Example], answers: Sequence[str], names: Sequence[str], predictions: list[dict[str, Any]]
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in names}
    for example, answer, prediction in zip(examples, answers, predictions, strict=True):
        prediction["answer"] = answer
        if not example.responses:
            continue
        for name in names:
            value = _ANSWER_FUNCTIONS[name](answer, example.responses)
            prediction["metrics"][name] = value
            values[name].append(value)
    if not next(iter(values.values())):
        raise DataError(f"{', '.join(names)} need accepted answers, but no example has any.")
    return values
