"""What people would use without tuning anything: BM25, the dense retriever, and both together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.config.fields import ranking_metrics_of
from fedrag_cli.config.schema import FusionConfig
from fedrag_cli.data.examples import Example
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


def best_baseline(baselines: dict[str, Evaluation], metric: str) -> str:
    """Return the name of the baseline with the largest mean of a ranking metric."""
    return max(baselines, key=lambda name: baselines[name].means()[metric])
