"""What people would use without tuning anything: BM25, the dense retriever, and both together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.config.fields import ranking_metrics_of
from fedrag_cli.config.schema import FusionConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.evaluation.comparison import compare_metrics
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.config import BM25Config
from fedrag_cli.rag.hybrid import HybridSearch
from fedrag_cli.rag.lexical import LexicalIndex
from fedrag_cli.rag.system import RAGSystem

BM25, DENSE, HYBRID = "BM25", "dense", "hybrid"


def evaluate_baselines(
    rag_system: RAGSystem, examples: Sequence[Example], metrics: Sequence[str], settings: EvaluationConfig
) -> dict[str, Evaluation]:
    """Measure the rankings of untuned retrieval on the same questions.

    Args:
        rag_system: The system before any training; its own lexical side is taken where it has one, BM25 with its
            defaults where it has none.
        examples: The questions.
        metrics: Those of the evaluation; only the ranking ones are measured.
        settings: As for `evaluate`.

    Returns:
        By name: `BM25`, `dense`, and `hybrid` with the default weight; nothing where no ranking is measured.
    """
    ranking = ranking_metrics_of(metrics)
    if not ranking or settings.context != "retrieved" or not len(rag_system.knowledge_store):
        return {}
    own = rag_system.hybrid
    lexical = own.lexical if own is not None else LexicalIndex.build(rag_system.knowledge_store.nodes, BM25Config())
    variants = {
        BM25: HybridSearch(lexical, FusionConfig(method="lexical")),
        DENSE: None,
        HYBRID: HybridSearch(lexical, FusionConfig()),
    }
    return {
        name: evaluate(dataclasses.replace(rag_system, generator=None, hybrid=variant), examples, ranking, settings)
        for name, variant in variants.items()
    }


def compare_to_baselines(
    baselines: Mapping[str, Evaluation], after: Evaluation | None, settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """Hold a system against untuned retrieval, as plain values for summaries.

    Args:
        baselines: What `evaluate_baselines` gave.
        after: The tuned system on the same questions.
        settings: Give the confidence and the resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        `rows`: for each baseline its `name` and `differences` (tuned less baseline, a `MetricDifference` a metric);
        `best`: the baseline with the largest mean of the first metric, and what tuning has over it; `verdict` in
        words. Empty where there is nothing to compare.
    """
    if not baselines or after is None:
        return {}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "differences": [
                difference.to_dict()
                for difference in compare_metrics(
                    found.values, {metric: after.values[metric] for metric in found.values}, settings, seed
                )
            ],
        }
        for name, found in baselines.items()
    ]
    best = max(rows, key=lambda row: row["differences"][0]["before"])
    first = best["differences"][0]
    change = first["difference"]
    says = {"better": "beats", "worse": "falls behind"}.get(first["verdict"], "is not shown to beat")
    verdict = (
        f"The tuned system {says} the best untuned retrieval, {best['name']}: {first['metric']} {first['after']:.4f} "
        f"against {first['before']:.4f} ({change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}])."
    )
    return {"rows": rows, "best": {"name": best["name"], **first}, "verdict": verdict}
