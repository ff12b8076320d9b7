"""What a change did to each metric: means, the interval of the paired difference, and a verdict in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedrag_cli.config.metrics import LOWER_IS_BETTER
from fedrag_cli.config.schema import EvaluationConfig
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.bootstrap import Interval, metric_difference, metric_mean

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
