from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrag_cli.config import load_config
from fedrag_cli.config.fields import METRIC_HELP
from fedrag_cli.config.problems import ConfigProblem, InvalidConfigError, Position, suggestion
from fedrag_cli.registry import registry

EXAMPLES = ", ".join(sorted(registry().of_kind("examples")))
METRICS = f"(metrics: {METRIC_HELP})"


def config_with(path: str = "", value: Any = None) -> dict[str, Any]:
    """Return a right config in which one value is set, by its dotted path."""
    config: dict[str, Any] = {
        "rag_system": {"retriever": {"model": "org/r"}, "generator": {"model": "org/g"}},
        "dataset": {name: {"path": f"{name}.jsonl"} for name in ("corpus", "train", "validation", "test")},
    }
    if path:
        *parents, last = path.split(".")
        section = config
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    return config


def problems(folder: Path, config: dict[str, Any], *overrides: str) -> list[str]:
    """Return the problems of a config without the file names and lines."""
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, overrides)
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


def test_the_config_that_the_other_tests_change_is_right(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_with()), encoding="utf-8")
    assert load_config(path).dataset.test.path == str(tmp_path / "test.jsonl")


def test_misspelt_keys_at_three_depths_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = """\
rag_system:
  retriever: {model: org/r}
  topk: 3
dataset:
  corpus: {path: c.jsonl}
trainr:
  mode: retriever
trainer:
  retriever:
    learning_rat: 0.1
    validation:
      metrc: mrr
      every: -1
"""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}:3: rag_system.topk: is no setting here (did you mean 'top_k'?)",
        f"{path}:6: trainr: is no setting here (did you mean 'trainer'?)",
        f"{path}:10: trainer.retriever.learning_rat: is no setting here (did you mean 'learning_rate'?)",
        f"{path}:12: trainer.retriever.validation.metrc: is no setting here (did you mean 'metric'?)",
        f"{path}:13: trainer.retriever.validation.every: must be greater than 0, not -1; "
        "or -1 is not one of epoch, never",
    ]
    assert caught.value.message.startswith("The config has 5 problems:\n  ")
    assert "fedrag components" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.seed", "three", "must be a whole number, not 'three'"),
        ("run.seed", 1.5, "must be a whole number, not 1.5"),
        ("run.seed", -1, "must be greater than or equal to 0, not -1"),
        ("run.seed", True, "True is no number"),
        ("run.seed", None, "must be a whole number, not None"),
        ("run.name", 2024, "must be a text, not 2024"),
        ("run.name", "", "must not be empty"),
        ("run.name", ["a"], "must be a text, not ['a']"),
        ("run", ["a"], "needs settings below it ('key: value' lines), not ['a']"),
        ("run", "a", "needs settings below it ('key: value' lines), not 'a'"),
        ("run.report_to", "tensorboard", "must be a list, not 'tensorboard'"),
        ("rag_system.top_k", 0, "must be greater than 0, not 0"),
        ("rag_system.generator.temperature", -0.5, "must be greater than or equal to 0, not -0.5"),
        ("trainer.retriever", "lsr", "needs settings below it ('key: value' lines), not 'lsr'"),
        ("trainer.retriever.learning_rate", 0, "must be greater than 0, not 0"),
        ("trainer.retriever.learning_rate", float("nan"), "must be a finite number, not nan"),
        ("trainer.retriever.learning_rate", float("inf"), "must be a finite number, not inf"),
        ("trainer.retriever.lm_temperature", float("-inf"), "must be a finite number, not -inf"),
        ("trainer.retriever.epochs", "all", "must be a number, not 'all'"),
        ("trainer.retriever.epochs", False, "False is no number"),
        ("trainer.retriever.warmup", 1.5, "must be less than 1, not 1.5"),
        ("trainer.retriever.dropout", "maybe", "must be true or false, not 'maybe'"),
        ("trainer.retriever.train", "querry", "'querry' is not one of query, both (did you mean 'query'?)"),
        ("trainer.retriever.train", "x", "'x' is not one of query, both"),
        ("rag_system.generator.quantization", 8, "8 is not one of 8bit, 4bit, null (did you mean '8bit'?)"),
        ("rag_system.generator.quantization", "16bit", "'16bit' is not one of 8bit, 4bit, null"),
        ("rag_system.generator.quantization", "8bits", "'8bits' is not one of 8bit, 4bit, null (did you mean '8bit'?)"),
        ("rag_system.generator.quantization", "none", "'none' is not one of 8bit, 4bit, null"),
        ("rag_system.generator.precision", "float32", "'float32' is not one of weights, bfloat16, fast"),
        (
            "rag_system.generator.precision",
            "bf16",
            "'bf16' is not one of weights, bfloat16, fast (did you mean 'bfloat16'?)",
        ),
        ("rag_system.generator.device_map", "cpu", "'cpu' is not one of auto, balanced, sequential, null"),
        (
            "trainer.retriever.save_every",
            "epochs",
            "must be a whole number, not 'epochs'; or 'epochs' is not one of epoch, never (did you mean 'epoch'?)",
        ),
        ("trainer.generator.lora", True, "needs settings below it ('key: value' lines), not True"),
        ("trainer.generator.lora.r", 0, "must be greater than 0, not 0"),
        ("trainer.generator.lora.target_modules", 5, "must be a text, not 5; or must be a list, not 5"),
        ("evaluation.confidence", 95, "must be less than or equal to 1, not 95"),
        ("evaluation.metrics", "mrr", "must be a list, not 'mrr'"),
        ("dataset.train.columns.query", "", "must not be empty"),
        ("dataset.train.format", "xml", "'xml' is not one of auto, jsonl, json, csv, tsv, parquet"),
        ("trainer.retriever.validation.metric", "recall", f"'recall' is no metric {METRICS}"),
        ("rag_system.prompt.template", "{query}", "'{query}' lacks the placeholder {context}"),
        ("rag_system.prompt.template", "none", "'none' lacks the placeholder {context}, {query}"),
        (
            "rag_system.prompt.template",
            "{context} {query} {answer}",
            "'{context} {query} {answer}' has the unknown placeholder {answer} (known: {context}, {query})",
        ),
        (
            "rag_system.prompt.template",
            "{context} {query} {",
            "'{context} {query} {' is not a template: Single '{' encountered in format string "
            "(write {{ and }} for braces)",
        ),
        ("rag_system.prompt.passage_template", "{title}", "'{title}' lacks the placeholder {text}"),
    ],
)
def test_wrong_values(tmp_path: Path, path: str, value: Any, message: str) -> None:
    assert problems(tmp_path, config_with(path, value)) == [f"{path}: {message}"]


def test_right_values_that_look_unusual(tmp_path: Path) -> None:
    config = config_with("rag_system.prompt.template", "{{json}} {context} {query}")
    config["rag_system"]["prompt"]["passage_template"] = "{title}: {text}"
    config["trainer"] = {"retriever": {"learning_rate": "3e-5", "top_k": "8", "validation": {"every": 5}}}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    trainer = load_config(path).trainer.retriever
    assert (trainer.learning_rate, trainer.top_k, trainer.validation.every) == (3e-5, 8, 5)


@pytest.mark.parametrize("metric", ["exact_match", "f1", "mrr", "hit@1", "recall@20", "ndcg@10"])
def test_metric_names(tmp_path: Path, metric: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_with("evaluation.metrics", [metric])), encoding="utf-8")
    assert load_config(path).evaluation.metrics == (metric,)


@pytest.mark.parametrize("metric", ["recall", "recall@0", "ndcg@", "hit@1.5", "MRR", "loss", "f1@3", "mrr\n"])
def test_names_that_are_no_metrics(tmp_path: Path, metric: str) -> None:
    found = problems(tmp_path, config_with("evaluation.metrics", ["mrr", metric]))
    assert found == [f"evaluation.metrics[1]: {metric!r} is no metric {METRICS}"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trainer.retriever.type", "lsrr", "there is no type 'lsrr' (did you mean 'lsr'?)"),
        ("dataset.train.type", "sqad", "there is no type 'sqad' (did you mean 'squad'?)"),
        ("dataset.train.type", "xyz", f"there is no type 'xyz' (known: {EXAMPLES})"),
        ("dataset.train.type", 5, f"there is no type '5' (known: {EXAMPLES})"),
        ("dataset.train.type", ["squad"], "there is no type '['squad']' (did you mean 'squad'?)"),
        ("rag_system.knowledge_store.type", {"a": 1}, "there is no type '{'a': 1}' (known: faiss, memory, qdrant)"),
        ("trainer.retriever.type", None, "None is not one of lsr"),
    ],
)
def test_unknown_types(tmp_path: Path, path: str, value: Any, message: str) -> None:
    assert problems(tmp_path, config_with(path, value)) == [f"{path}: {message}"]


def test_keys_are_looked_up_in_the_type_that_was_chosen(tmp_path: Path) -> None:
    config = config_with("dataset.train", {"type": "beir", "path": "folder", "splt": "test", "columns": {"query": "q"}})
    assert problems(tmp_path, config) == [
        "dataset.train.splt: is no setting here (did you mean 'split'?)",
        "dataset.train.columns: is no setting here (known: limit, path, split, type)",
    ]


def test_required_settings(tmp_path: Path) -> None:
    assert problems(tmp_path, {"run": {"name": "x"}}) == ["rag_system: is required", "dataset: is required"]
    config = {"rag_system": {"generator": {}}, "dataset": {"train": {"type": "squad"}}}
    assert problems(tmp_path, config) == [
        "rag_system.retriever: is required",
        "rag_system.generator.model: is required",
        "dataset.corpus: is required",
        "dataset.train.path: is required",
    ]


def test_keys_that_are_no_texts(tmp_path: Path) -> None:
    assert problems(tmp_path, config_with("run", {1: 2})) == [
        "run.1: is no setting here (known: device, name, output_dir, report_to, seed)"
    ]


def test_wrong_overrides_are_reported_as_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_with("evaluation.metrics", ["mrr", "f1"])), encoding="utf-8")
    overrides = ["run.sed=3", "evaluation.metrics=[mrr,nope]", "dataset.train={path: 5}", "run.name.x=3"]
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, overrides)
    assert sorted(str(problem) for problem in caught.value.problems) == [
        "command line (dataset.train={path: 5}): dataset.train.path: must be a text, not 5",
        f"command line (evaluation.metrics=[mrr,nope]): evaluation.metrics[1]: 'nope' is no metric {METRICS}",
        "command line (run.name.x=3): run.name: must be a text, not {'x': 3}",
        "command line (run.sed=3): run.sed: is no setting here (did you mean 'seed'?)",
    ]
    assert {problem.position.line for problem in caught.value.problems} == {0}


def test_suggestion() -> None:
    assert suggestion("retriver", ["generator", "retriever"]) == " (did you mean 'retriever'?)"
    assert suggestion("x", ["b", "a"]) == " (known: a, b)"
    assert suggestion("x", []) == ""


def test_problem_without_a_path() -> None:
    assert str(ConfigProblem(Position("a.yaml", 3), "", "is bad")) == "a.yaml:3: is bad"


SECRET = "s3cret-value-of-a-token"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.seed", "${oc.env:TOKEN}", "must be a whole number, not the value of ${oc.env:TOKEN}"),
        ("run.seed", "${run.name}", "must be a whole number, not the value of ${oc.env:TOKEN}"),
        ("run.report_to", "x ${oc.env:TOKEN}", "must be a list, not the value of x ${oc.env:TOKEN}"),
        ("run.seed", ["${oc.env:TOKEN}", 1], "must be a whole number, not [the value of ${oc.env:TOKEN}, 1]"),
        ("run.seed", {"a": "${oc.env:TOKEN}"}, "must be a whole number, not {'a': the value of ${oc.env:TOKEN}}"),
        ("trainer.mode", "${oc.env:TOKEN}", "the value of ${oc.env:TOKEN} is not one of retriever, generator"),
        ("rag_system.retriever.type", "${oc.env:TOKEN}", "there is no type the value of ${oc.env:TOKEN} (known: "),
        ("evaluation.metrics", ["${oc.env:TOKEN}"], "the value of ${oc.env:TOKEN} is no metric"),
        ("trainer.generator.lora", "${oc.env:TOKEN}", "needs settings below it ('key: value' lines), not the value of"),
        ("run.seed", "${oc.decode:'[${oc.env:TOKEN}'}", "stands for a text that cannot be read"),
    ],
)
def test_a_value_from_the_environment_is_not_quoted(
    tmp_path: Path, path: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    config = config_with("run.name", "${oc.env:TOKEN}")
    *parents, last = path.split(".")
    section = config
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    assert all(SECRET not in str(problem) for problem in caught.value.problems)
