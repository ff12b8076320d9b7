"""Ranking metrics against values worked out by hand and against a plain reference."""

from __future__ import annotations

import math
import random

import pytest

from fedrag_cli.errors import ConfigError, DataError, FedRAGError
from fedrag_cli.evaluation.ranking import ranking_metrics

NAMES = ["mrr", "hit@1", "hit@3", "hit@50", "recall@1", "recall@3", "recall@50", "ndcg@1", "ndcg@3", "ndcg@50"]


def reference(name: str, ranking: list[str], relevant: set[str]) -> float:
    family, _, cutoff = name.partition("@")
    if family == "mrr":
        ranks = [rank for rank, passage_id in enumerate(ranking, start=1) if passage_id in relevant]
        return 1 / ranks[0] if ranks else 0.0
    k = int(cutoff)
    found = [passage_id in relevant for passage_id in ranking[:k]]
    if family == "hit":
        return float(any(found))
    if family == "recall":
        return sum(found) / len(relevant)
    gain = sum(1 / math.log2(1 + rank) for rank, hit in enumerate(found, start=1) if hit)
    best = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(relevant)) + 1))
    return gain / best


def test_values_worked_out_by_hand() -> None:
    metrics = ranking_metrics([["x", "a", "b"]], [["a", "b"]], ["mrr", "ndcg@3", "hit@1", "hit@2", "recall@2"])
    assert list(metrics) == ["mrr", "ndcg@3", "hit@1", "hit@2", "recall@2"]
    assert metrics["mrr"] == [0.5]
    assert metrics["ndcg@3"] == [pytest.approx(0.693426, abs=1e-6)]
    assert metrics["hit@1"] == [0.0]
    assert metrics["hit@2"] == [1.0]
    assert metrics["recall@2"] == [0.5]


def test_mean_reciprocal_rank_of_four_questions() -> None:
    metrics = ranking_metrics([["a"], ["b"], ["c"], ["d"]], [["x"], ["x"], ["x"], ["d"]], ["mrr", "hit@1"])
    assert metrics["mrr"] == [0.0, 0.0, 0.0, 1.0]
    assert sum(metrics["hit@1"]) / 4 == 0.25


def test_equals_the_reference_on_random_rankings() -> None:
    generator = random.Random(7)
    corpus = [f"p{number}" for number in range(60)]
    rankings = [generator.sample(corpus, generator.randint(0, 60)) for _ in range(300)]
    relevant = [set(generator.sample(corpus, generator.randint(1, 8))) for _ in range(300)]
    metrics = ranking_metrics(rankings, relevant, NAMES)
    for name in NAMES:
        expected = [reference(name, ranking, ids) for ranking, ids in zip(rankings, relevant, strict=True)]
        assert metrics[name] == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("ranking", [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]])
def test_the_given_order_counts_whatever_the_ids(ranking: list[str]) -> None:
    metrics = ranking_metrics([ranking], [["b"]], ["mrr"])
    assert metrics["mrr"] == [pytest.approx(1 / (ranking.index("b") + 1))]


def test_empty_rankings_score_zero() -> None:
    metrics = ranking_metrics([[], ["a"], []], [["a"], ["a"], ["a"]], ["mrr", "ndcg@5"])
    assert metrics == {"mrr": [0.0, 1.0, 0.0], "ndcg@5": [0.0, 1.0, 0.0]}
    assert ranking_metrics([[]], [["a"]], ["recall@3"]) == {"recall@3": [0.0]}
    assert ranking_metrics([], [], ["mrr"]) == {"mrr": []}
    assert ranking_metrics([["a"]], [["a"]], []) == {}


def test_ids_beyond_ascii() -> None:
    metrics = ranking_metrics([["straße 1", "東京", "a b"]], [["東京", "a b"]], ["mrr", "recall@3"])
    assert metrics == {"mrr": [0.5], "recall@3": [1.0]}


def test_questions_without_relevant_passages_are_named() -> None:
    with pytest.raises(DataError, match=r"2 questions .* positions 0, 2\."):
        ranking_metrics([["a"], ["a"], ["a"]], [[], ["a"], []], ["mrr"])


def test_many_positions_are_cut_short() -> None:
    with pytest.raises(DataError, match=r"positions 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\."):
        ranking_metrics([["a"]] * 12, [[]] * 12, ["mrr"])


def test_unequal_lengths_are_an_error() -> None:
    with pytest.raises(DataError, match="1 rankings, but 2"):
        ranking_metrics([["a"]], [["a"], ["b"]], ["mrr"])


def test_a_passage_twice_is_an_error() -> None:
    with pytest.raises(FedRAGError, match="positions 1"):
        ranking_metrics([["a", "b"], ["a", "a"]], [["a"], ["a"]], ["mrr"])


@pytest.mark.parametrize("name", ["exact_match", "hit", "hit@0", "mrr@10", "ndcg@x"])
def test_other_names_are_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ranking_metrics([["a"]], [["a"]], [name])


def test_the_same_text_under_two_ids_counts_once_at_the_rank_of_the_first() -> None:
    """a and A say the same, as do b and B; the question's passages are a and c, or (second question) a, A and c."""
    same = {"a": "a", "A": "a", "b": "b", "B": "b", "c": "c"}
    rankings = [["b", "A", "a", "c"]] * 2
    relevant = [["a", "c"], ["a", "A", "c"]]
    found = ranking_metrics(rankings, relevant, ["mrr", "hit@1", "recall@2", "recall@3", "recall@4", "ndcg@4"], same)
    assert found["mrr"] == [0.5, 0.5]
    assert found["hit@1"] == [0.0, 0.0]
    assert found["recall@2"] == found["recall@3"] == [0.5, 0.5]
    assert found["recall@4"] == [1.0, 1.0]
    gain = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert found["ndcg@4"] == pytest.approx([gain, gain])
    # Repetitions of what is not relevant take up their ranks too.
    assert ranking_metrics([["b", "B", "c"]], [["c"]], ["mrr"], same)["mrr"] == pytest.approx([1 / 3])
