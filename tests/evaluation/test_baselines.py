"""Untuned retrieval beside a tuned system: what is measured, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.cli.main import main
from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import EvaluationConfig, load_config
from fedrag_cli.evaluation.baselines import compare_to_baselines, evaluate_baselines
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.build import build_rag_system

WriteConfig = Callable[..., Path]


@pytest.mark.parametrize("lexical", [[], ["rag_system.lexical={}"]])
def test_each_baseline_is_the_system_with_that_retrieval(write_config: WriteConfig, lexical: list[str]) -> None:
    config = load_config(write_config(), lexical)
    data = load_run_data(config)
    found = evaluate_baselines(
        build_rag_system(config, with_generator=False), data.evaluation, ["mrr", "f1", "recall@5"], config.evaluation
    )
    assert list(found) == ["BM25", "dense", "hybrid"]
    settings = {
        "BM25": ["rag_system.lexical={}", "rag_system.fusion.method=lexical", "trainer.mode=generator"],
        "dense": [],
        "hybrid": ["rag_system.lexical={}"],
    }
    for name, overrides in settings.items():
        system = build_rag_system(load_config(write_config(), overrides), with_generator=False)
        assert found[name].values == evaluate(system, data.evaluation, ["mrr", "recall@5"], config.evaluation).values
    # Each question of the tiny data has words of its passage.
    assert found["BM25"].means()["mrr"] > found["dense"].means()["mrr"]


def test_nothing_is_measured_where_there_is_no_ranking(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    system, questions = build_rag_system(config, with_generator=False), load_run_data(config).evaluation
    assert evaluate_baselines(system, questions, ["f1"], config.evaluation) == {}
    assert evaluate_baselines(system, questions, ["mrr"], EvaluationConfig(context="none")) == {}
    assert compare_to_baselines({}, Evaluation(1, {"f1": [1.0]}), config.evaluation, 0) == {}


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (
            [1.0] * 40,
            "beats the best untuned retrieval, hybrid: mrr 1.0000 against 0.5000 (+0.5000 [",
        ),
        ([0.25] * 40, "falls behind the best untuned retrieval, hybrid: mrr 0.2500 against 0.5000 (-0.2500"),
        ([0.0, 1.0] * 20, "is not shown to beat the best untuned retrieval, hybrid: mrr 0.5000 against 0.5000"),
    ],
)
def test_the_verdict_is_about_the_best_untuned_one(after: list[float], says: str) -> None:
    baselines = {
        "BM25": Evaluation(40, {"mrr": [0.2] * 40, "recall@1": [1.0] * 40}),
        "hybrid": Evaluation(40, {"mrr": [0.5] * 40, "recall@1": [0.0] * 40}),
    }
    tuned = Evaluation(40, {"mrr": after, "recall@1": [0.0] * 40, "f1": [0.0] * 40})
    compared = compare_to_baselines(baselines, tuned, EvaluationConfig(resamples=200), 0)
    assert compared["verdict"].startswith(f"The tuned system {says}")
    assert compared["best"]["name"] == "hybrid"
    assert [row["name"] for row in compared["rows"]] == ["BM25", "hybrid"]
    assert [item["metric"] for item in compared["rows"][0]["differences"]] == ["mrr", "recall@1"]


def test_a_training_run_shows_them_everywhere(write_config: WriteConfig, capsys: Any) -> None:
    path = write_config()
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().err
    run = next((path.parent / "runs" / "tiny").iterdir())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "Against retrieval without tuning, by mrr:" in said
    header = said.split("Against retrieval without tuning, by mrr:\n")[1].splitlines()[0]
    assert header.split()[:3] == ["retrieval", "untuned", "tuned"]
    assert "## Against retrieval without tuning" in card
    for text in (said, card):
        assert summary["untuned"]["verdict"] in text
    (dense,) = (row for row in summary["untuned"]["rows"] if row["name"] == "dense")
    before = {item["metric"]: item["before"] for item in summary["differences"]}
    assert {item["metric"]: item["before"] for item in dense["differences"]} == pytest.approx(before)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stages = [event["stage"] for event in events if event["event"] == "evaluation"]
    assert stages == ["before", "untuned BM25", "untuned dense", "untuned hybrid", "after"]
