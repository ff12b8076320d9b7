"""The comparison of two evaluations of the same questions."""

from __future__ import annotations

import json

import pytest

from fedrag_cli.config.schema import EvaluationConfig
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.comparison import compare_metrics

SETTINGS = EvaluationConfig(resamples=2000)
LOW = [0.0, 0.1, 0.2, 0.1, 0.0, 0.2, 0.1, 0.0]
HIGH = [0.9, 1.0, 0.8, 0.9, 1.0, 0.7, 0.9, 1.0]
MIXED = [0.1, 0.0, 0.1, 0.2, 0.0, 0.2, 0.0, 0.1]


def test_verdicts() -> None:
    differences = compare_metrics(
        {"mrr": LOW, "f1": HIGH, "hit@3": LOW},
        {"hit@3": MIXED, "mrr": HIGH, "f1": LOW},
        SETTINGS,
    )
    assert [(item.metric, item.verdict) for item in differences] == [
        ("mrr", "better"),
        ("f1", "worse"),
        ("hit@3", "no difference shown"),
    ]


@pytest.mark.parametrize("metric", ["loss", "negative_log_likelihood", "perplexity"])
def test_lower_is_better_for_losses(metric: str) -> None:
    low, high = [1 + value for value in LOW], [1 + value for value in HIGH]
    assert compare_metrics({metric: high}, {metric: low}, SETTINGS)[0].verdict == "better"
    assert compare_metrics({metric: low}, {metric: high}, SETTINGS)[0].verdict == "worse"


def test_means_and_interval() -> None:
    item = compare_metrics({"mrr": LOW}, {"mrr": HIGH}, SETTINGS, seed=3)[0]
    assert item.n == 8
    assert item.before == pytest.approx(0.0875)
    assert item.after == pytest.approx(0.9)
    assert item.difference.mean == pytest.approx(0.8125)
    assert 0.6 < item.difference.low < 0.8125 < item.difference.high < 1.0
    assert item == compare_metrics({"mrr": LOW}, {"mrr": HIGH}, SETTINGS, seed=3)[0]


def test_unchanged_values_show_no_difference() -> None:
    item = compare_metrics({"mrr": HIGH}, {"mrr": HIGH}, SETTINGS)[0]
    assert item.verdict == "no difference shown"
    assert (item.difference.low, item.difference.high) == (0.0, 0.0)


def test_one_question_shows_nothing() -> None:
    item = compare_metrics({"mrr": [0.0]}, {"mrr": [1.0]}, SETTINGS)[0]
    assert item.verdict == "no difference shown"
    assert item.difference.mean == 1.0


def test_the_dictionary_holds_plain_values() -> None:
    item = compare_metrics({"mrr": LOW}, {"mrr": HIGH}, SETTINGS)[0].to_dict()
    assert json.loads(json.dumps(item)) == item
    assert list(item) == ["metric", "n", "before", "after", "difference", "verdict", "confidence"]
    assert list(item["difference"]) == ["mean", "low", "high", "n"]
    assert type(item["after"]) is float
    assert type(item["difference"]["low"]) is float


def test_metrics_on_one_side_only_are_an_error() -> None:
    with pytest.raises(DataError, match="one side only: f1, mrr"):
        compare_metrics({"mrr": LOW, "hit@3": LOW}, {"f1": LOW, "hit@3": LOW}, SETTINGS)


def test_other_questions_are_an_error() -> None:
    with pytest.raises(DataError, match="8 values before and 7 after"):
        compare_metrics({"mrr": LOW}, {"mrr": HIGH[:7]}, SETTINGS)
