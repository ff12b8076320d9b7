"""The names of the metrics, and which part of a RAG system each of them looks at."""

from __future__ import annotations

import re
from collections.abc import Iterable

ANSWER_METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Of generated answers against the accepted ones."""

LIKELIHOOD_METRICS = ("accuracy", "negative_log_likelihood", "perplexity")
"""Of the generator's likelihoods of given answers."""

GENERATOR_METRICS = (*ANSWER_METRICS, *LIKELIHOOD_METRICS)
LOWER_IS_BETTER = frozenset({"loss", "negative_log_likelihood", "perplexity"})
GEOMETRIC = frozenset({"perplexity"})
"""Metrics whose mean is the geometric one."""

METRIC_UNBOUNDED = frozenset({"negative_log_likelihood", "perplexity"})
"""Metrics that are not between 0 and 1."""

METRIC_PATTERN = re.compile("|".join(GENERATOR_METRICS) + r"|mrr|(hit|recall|ndcg)@[1-9][0-9]*")
METRIC_HELP = f"{', '.join(GENERATOR_METRICS)}, mrr, hit@K, recall@K, ndcg@K"


def ranking_metrics_of(names: Iterable[str]) -> list[str]:
    """Return those names that are metrics of rankings."""
    return [name for name in names if name not in GENERATOR_METRICS]


def generator_metrics_of(names: Iterable[str]) -> list[str]:
    """Return those names that are metrics of the generator."""
    return [name for name in names if name in GENERATOR_METRICS]
