"""Paired differences of evaluations of the same questions: means, intervals, and a verdict in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedrag_cli.config.fields import LOWER_IS_BETTER
from fedrag_cli.config.schema import EvaluationConfig
from fedrag_cli.data.relevance import Overlap
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.bootstrap import Interval, metric_difference, metric_interval, metric_mean

Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class MetricDifference:
    """One metric before and after, on the same questions.

    Args:
        metric: Name of the metric.
        n: Number of questions.
        before: Mean before.
        after: Mean after.
        difference: Mean of after - before, with its interval.
        verdict: What the interval shows.
        confidence: Level of the interval, in [0, 1].
    """

    metric: str
    n: int
    before: float
    after: float
    difference: Interval
    verdict: Verdict
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON; `difference` holds `mean`, `low`, `high` and `n`."""
        return dataclasses.asdict(self)


def compare_metrics(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    settings: EvaluationConfig,
    seed: int = 0,
) -> list[MetricDifference]:
    """Compare every metric of two evaluations of the same questions.

    Args:
        before: For every metric, one value a question.
        after: The same metrics for the same questions, in the same order.
        settings: Gives the confidence and the resamples of the bootstrap.
        seed: Seed of the bootstrap; all metrics share it, so all are judged on the same resamples of the questions.

    Returns:
        One difference a metric, in the order of `before`.

    Raises:
        DataError: If the metrics differ, the questions are not as many, or a value is not finite.
    """
    only_once = sorted(set(before) ^ set(after))
    if only_once:
        raise DataError(
            f"These metrics were computed on one side only: {', '.join(only_once)}.",
            "Evaluate both with the same metrics.",
        )
    return [_compare(metric, before[metric], after[metric], settings, seed) for metric in before]


def _compare(
    metric: str, before: Sequence[float], after: Sequence[float], settings: EvaluationConfig, seed: int
) -> MetricDifference:
    difference = metric_difference(metric, before, after, settings.confidence, settings.resamples, seed)
    return MetricDifference(
        metric=metric,
        n=difference.n,
        before=metric_mean(metric, before),
        after=metric_mean(metric, after),
        difference=difference,
        verdict=_verdict(metric, difference),
        confidence=settings.confidence,
    )


def _verdict(metric: str, difference: Interval) -> Verdict:
    # The interval of a single question has no width, so it would exclude 0 whatever the question is.
    if difference.n < 2 or not difference.excludes_zero():
        return "no difference shown"
    gain = -difference.mean if metric in LOWER_IS_BETTER else difference.mean
    return "better" if gain > 0 else "worse"


Prediction = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """One evaluation by its records of the questions.

    Args:
        name: What it is asked for by, such as a run directory.
        predictions: Records as `Evaluation.predictions` has them.
        label: What it is called in tables; the name by default.
        seed: Seed of its run, with which its intervals are drawn.
    """

    name: str
    predictions: Sequence[Prediction]
    label: str = ""
    seed: int = 0

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


@dataclass(frozen=True)
class Comparison:
    """What one evaluation has over another on the same questions.

    Args:
        baseline: The evaluation that is compared with.
        other: The evaluation that is compared.
        differences: Each metric that both have.
        won: For each metric the ids of the questions that it answers better.
        lost: For each metric the ids of those that it answers worse.
        questions: Number of questions that both were asked.
        left_out: Number of questions that only one of them was asked.
        skipped_metrics: Metrics that only one of them has.
        in_train: Number of questions that one of them was trained on.
    """

    baseline: Evaluated
    other: Evaluated
    differences: list[MetricDifference]
    won: dict[str, list[str]]
    lost: dict[str, list[str]]
    questions: int
    left_out: int
    skipped_metrics: list[str] = field(default_factory=list)
    in_train: int = 0

    def statements(self) -> dict[Verdict, str]:
        """Say for each verdict that there is in which metrics it holds."""
        found: dict[Verdict, list[str]] = {"better": [], "worse": [], "no difference shown": []}
        for item in self.differences:
            found[item.verdict].append(item.metric if item.verdict == "no difference shown" else _gain(item))
        return {verdict: f"{verdict} in {', '.join(metrics)}" for verdict, metrics in found.items() if metrics}

    def leak(self) -> str:
        """Say how many of the questions were trained on; empty where none was."""
        if not self.in_train:
            return ""
        overlap = Overlap("compared", "train", self.in_train, self.questions, is_measured=True)
        return f"{overlap.message}."

    def verdict(self) -> str:
        """Say in a sentence what the comparison shows, and in a second one where it shows less than it seems to."""
        shown = f"{self.other.title} against {self.baseline.title}: {'; '.join(self.statements().values())}."
        return f"{shown} {self.leak()}".strip()

    def is_worse(self) -> bool:
        """Return whether a metric is shown to be worse."""
        return any(item.verdict == "worse" for item in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON."""
        return {
            "baseline": self.baseline.name,
            "name": self.other.name,
            "baseline_label": self.baseline.title,
            "label": self.other.title,
            "questions": self.questions,
            "left_out": self.left_out,
            "skipped_metrics": self.skipped_metrics,
            "differences": [
                {**item.to_dict(), "won": len(self.won[item.metric]), "lost": len(self.lost[item.metric])}
                for item in self.differences
            ],
            "won": self.won,
            "lost": self.lost,
            "in_train": self.in_train,
            "leak": self.leak(),
            "verdict": self.verdict(),
        }


def compare(baseline: Evaluated, other: Evaluated, settings: EvaluationConfig, seed: int = 0) -> Comparison:
    """Compare an evaluation with a baseline, question by question.

    Questions are the same where id and text are; others are left out and counted. A metric is compared over the
    questions that it applies to on both sides.

    Raises:
        DataError: They have no question or no metric in common.
    """
    known = {_question(row): row for row in baseline.predictions}
    pairs = [(known[_question(row)], row) for row in other.predictions if _question(row) in known]
    if not pairs:
        raise DataError(
            f"'{baseline.name}' and '{other.name}' have no question in common.",
            "Evaluate both on the same data, with the same evaluation.split and evaluation.limit.",
        )
    first, second = ({name for pair in pairs for name in pair[side]["metrics"]} for side in (0, 1))
    metrics = list(dict.fromkeys(name for row, _ in pairs for name in row["metrics"] if name in first & second))
    differences, won, lost = [], {}, {}
    for metric in metrics:
        both = [(b, o) for b, o in pairs if metric in b["metrics"] and metric in o["metrics"]]
        if not both:
            continue
        before, after = ([pair[side]["metrics"][metric] for pair in both] for side in (0, 1))
        differences += compare_metrics({metric: before}, {metric: after}, settings, seed)
        sign = -1 if metric in LOWER_IS_BETTER else 1
        gains = {o["id"]: sign * (o["metrics"][metric] - b["metrics"][metric]) for b, o in both}
        won[metric] = [name for name, gain in gains.items() if gain > 0]
        lost[metric] = [name for name, gain in gains.items() if gain < 0]
    if not differences:
        raise DataError(
            f"'{baseline.name}' and '{other.name}' have no metric in common.",
            "Evaluate both with the same evaluation.metrics.",
        )
    left_out = len(baseline.predictions) + len(other.predictions) - 2 * len(pairs)
    skipped = sorted(first ^ second)
    in_train = sum(any("in_train" in row for row in pair) for pair in pairs)
    return Comparison(baseline, other, differences, won, lost, len(pairs), left_out, skipped, in_train)


def metric_table(evaluated: Evaluated, settings: EvaluationConfig, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return each metric of an evaluation with mean, interval and n."""
    found: dict[str, list[float]] = {}
    for row in evaluated.predictions:
        for name, value in row["metrics"].items():
            found.setdefault(name, []).append(value)
    table = {}
    for name, values in found.items():
        table[name] = asdict(metric_interval(name, values, settings.confidence, settings.resamples, seed))
    return table


def _question(row: Prediction) -> tuple[str, str]:
    return str(row["id"]), str(row["query"])


def _gain(item: MetricDifference) -> str:
    difference = item.difference
    return f"{item.metric} ({difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}])"
