"""Evaluating a RAG system on questions: rankings, answers, and likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.config.fields import ANSWER_METRICS, generator_metrics_of, ranking_metrics_of
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import distinct_ids, first_ids
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.generator_metrics import answer_values, is_scored, likelihood_values
from fedrag_cli.evaluation.ranking import ranking_metrics
from fedrag_cli.evaluation.result import Evaluation, EvaluationMemory, Values
from fedrag_cli.rag.knowledge_stores.base import ScoredNode
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporter import Reporter, SilentReporter

RANKING_METRICS = ("mrr", "recall@1", "recall@5", "ndcg@10")
PLAIN_ANSWER_METRICS = ("exact_match", "f1")


def choose_metrics(
    wanted: Sequence[str] | None, sides: Sequence[str], examples: Sequence[Example], context: str = "retrieved"
) -> list[str]:
    """Return the metrics to compute.

    Args:
        wanted: The config's metrics; None takes those of the sides.
        sides: The sides that are tuned or looked at: retriever, generator.
        examples: The questions; without relevant ids a retriever is measured by its answers, and questions with choices
            are measured by accuracy.
        context: What answers are given from; rankings are measured where it is what was retrieved.

    Raises:
        DataError: A metric is wanted that applies to no example.
    """
    judged = any(example.relevant_ids for example in examples)
    choosing = any(example.choices for example in examples)
    if wanted is None:
        ranked = judged and context == "retrieved"
        ranking = RANKING_METRICS if "retriever" in sides and ranked else ()
        answering = "generator" in sides or not ranked
        plain = any(example.responses and not example.choices for example in examples) or not choosing
        answers = [*(["accuracy"] if choosing else []), *(PLAIN_ANSWER_METRICS if plain else ())]
        return [*ranking, *(answers if answering else ())]
    unjudged = ranking_metrics_of(wanted)
    if unjudged and not judged:
        raise DataError(
            f"{', '.join(unjudged)} need relevant ids, but no example has any.",
            "Add a relevant_ids column (columns.relevant_ids names it), or set evaluation.metrics: [exact_match, f1].",
        )
    if "accuracy" in wanted and not choosing:
        raise DataError(
            "accuracy needs choices, but no example has any.",
            "Add a choices column (columns.choices names it), or take exact_match.",
        )
    return list(wanted)


def require_questions(examples: Sequence[Example], metrics: Sequence[str], settings: EvaluationConfig) -> None:
    """Check that questions have what an evaluation of them looks at.

    Args:
        examples: The questions.
        metrics: Names as in the config.
        settings: Say what answers are given from, and by which column questions are grouped.

    Raises:
        DataError: A metric or the context has no question that it applies to, or a question has no group.
    """
    judged = any(example.relevant_ids for example in examples)
    ranking, answers = ranking_metrics_of(metrics), [name for name in metrics if name in ANSWER_METRICS]
    if ranking and not judged:
        raise DataError(f"{', '.join(ranking)} need relevant ids, but no example has any.")
    if settings.context == "oracle" and not judged:
        raise DataError(
            "evaluation.context is oracle, but no example has relevant ids.",
            "Add a relevant_ids column (columns.relevant_ids names it), or take the context retrieved.",
        )
    if answers and not any(example.responses for example in examples):
        raise DataError(f"{', '.join(answers)} need accepted answers, but no example has any.")
    for name in generator_metrics_of(metrics):
        if name not in answers and not any(is_scored(example, name) for example in examples):
            needed = "choices and accepted answers" if name == "accuracy" else "an accepted answer with text"
            raise DataError(f"{name} applies to no example: none has {needed}.")
    for example in examples:
        _group_of(example, settings.group_by)


def evaluate(
    rag_system: RAGSystem,
    examples: Sequence[Example],
    metrics: Sequence[str],
    settings: EvaluationConfig | None = None,
    *,
    reporter: Reporter | None = None,
    memory: Path | None = None,
) -> Evaluation:
    """Retrieve and, where a metric needs it, answer and score; then compare.

    Args:
        rag_system: What to evaluate, as it is.
        examples: Questions with accepted answers and relevant ids; relevant ids name passages of the store. A passage
            with the text of a relevant one is relevant too; how often such twins count, `ranking_metrics` says.
        metrics: Names as in the config.
        settings: Context, scoring of choices, groups and depth of the rankings; the defaults where left out.
        reporter: Shows the progress.
        memory: File that keeps what is computed, so that an evaluation that was stopped goes on; removed by nobody.

    Raises:
        DataError: A metric has no question that it applies to, or a question lacks the column of its group.
    """
    settings = settings or EvaluationConfig()
    require_questions(examples, metrics, settings)
    reporter = reporter or SilentReporter()
    known = EvaluationMemory(memory)
    queries = [example.query for example in examples]
    rankings = _rankings(rag_system, examples, metrics, settings, reporter)
    ranking = ranking_metrics_of(metrics)
    gold = _relevant_passages(rag_system, examples) if ranking or settings.context == "oracle" else {}
    sources = _sources(examples, rankings, gold, rag_system.top_k, settings)
    retrieved = {scored.node.id: scored.node for found in rankings for scored in found} if gold else {}
    same = first_ids((gold | retrieved).values())
    predictions = [_prediction(example, row, same, settings) for example, row in zip(examples, sources, strict=True)]
    lengths = [rag_system.retriever.measure(queries, "evaluation questions", queries=True)] if rankings else []
    truncated = {"queries": sum(item.truncated for item in lengths)}
    values: dict[str, Values] = {}
    if ranking:
        values |= _ranking_values(examples, rankings, same, ranking, max(settings.depth, rag_system.top_k))
    answering = [name for name in metrics if name in ANSWER_METRICS]
    if answering:
        found_values, cut, of_prompts = answer_values(
            rag_system, examples, sources, answering, predictions, known, reporter
        )
        truncated |= cut
        lengths.append(of_prompts)
        values |= found_values
    scoring = [name for name in generator_metrics_of(metrics) if name not in ANSWER_METRICS]
    if scoring:
        found, measured = likelihood_values(
            rag_system, examples, sources, scoring, settings, predictions, known, reporter
        )
        values, lengths = values | found, [*lengths, measured]
    for name, by_position in values.items():
        for position, value in by_position.items():
            predictions[position]["metrics"][name] = value
    groups = [prediction.get("group") for prediction in predictions]
    return Evaluation.of(
        len(examples), {name: values[name] for name in metrics}, groups, predictions, truncated, lengths
    )


def _rankings(
    rag_system: RAGSystem,
    examples: Sequence[Example],
    metrics: Sequence[str],
    settings: EvaluationConfig,
    reporter: Reporter,
) -> list[list[ScoredNode]]:
    """Return what is retrieved for each question; nothing where answers are given from something else."""
    if settings.context != "retrieved":
        return []
    queries = [example.query for example in examples]
    passages = len(rag_system.knowledge_store)
    cutoffs = [int(name.partition("@")[2]) for name in metrics if "@" in name]
    with reporter.task("Retrieving", len(queries), "question") as advance:
        wanted = max(settings.depth, rag_system.top_k, *cutoffs)
        return rag_system.batch_retrieve(queries, min(wanted, passages), advance)


def _relevant_passages(rag_system: RAGSystem, examples: Sequence[Example]) -> dict[str, KnowledgeNode]:
    """Return the passages that any example calls relevant, by id."""
    wanted = {name for example in examples for name in example.relevant_ids}
    return {node.id: node for node in rag_system.knowledge_store.nodes if node.id in wanted} if wanted else {}


def _sources(
    examples: Sequence[Example],
    rankings: list[list[ScoredNode]],
    gold: Mapping[str, KnowledgeNode],
    top_k: int,
    settings: EvaluationConfig,
) -> list[list[ScoredNode]]:
    """Return the passages that each answer is given from."""
    if settings.context == "none":
        return [[] for _ in examples]
    if settings.context == "retrieved":
        return [found[:top_k] for found in rankings]
    same = first_ids(gold.values())
    return [[ScoredNode(gold[name], 1.0) for name in distinct_ids(example.relevant_ids, same)] for example in examples]


def _prediction(
    example: Example, passages: Sequence[ScoredNode], same: Mapping[str, str], settings: EvaluationConfig
) -> dict[str, Any]:
    # What is relevant because of its text, which is that of a passage that the example names.
    named = {same[name]: name for name in example.relevant_ids if name in same}
    twins = {
        scored.node.id: {"same_as": named[same[scored.node.id]]}
        for scored in passages
        if same.get(scored.node.id) in named and scored.node.id not in example.relevant_ids
    }
    prediction: dict[str, Any] = {
        "id": example.id,
        "query": example.query,
        "passages": [
            {"id": scored.node.id, "score": scored.score, **twins.get(scored.node.id, {})} for scored in passages
        ],
        "accepted": list(example.responses),
        "relevant_ids": list(example.relevant_ids),
        "metrics": {},
    }
    group = _group_of(example, settings.group_by)
    if group is not None:
        prediction["group"] = group
    return prediction


def _group_of(example: Example, column: str | None) -> str | None:
    """Return the group of a question; None where they are not grouped."""
    if column is None:
        return None
    group = example.metadata.get(column)
    if group is None or group == "":
        raise DataError(
            f"{example.name} has no '{column}', by which evaluation.group_by groups.",
            f"Its further columns: {', '.join(example.metadata) or 'none'}.",
        )
    return str(group)


def _ranking_values(
    examples: Sequence[Example],
    found: Sequence[list[ScoredNode]],
    same: Mapping[str, str],
    names: Sequence[str],
    depth: int,
) -> dict[str, Values]:
    judged = [position for position, example in enumerate(examples) if example.relevant_ids]
    rankings = [[scored.node.id for scored in found[position]] for position in judged]
    relevant = [examples[position].relevant_ids for position in judged]
    values = ranking_metrics(rankings, relevant, [name for name in names if name != "mrr"], same)
    if "mrr" in names:
        values = ranking_metrics([ranking[:depth] for ranking in rankings], relevant, ["mrr"], same) | values
    return {name: dict(zip(judged, row, strict=True)) for name, row in values.items()}
