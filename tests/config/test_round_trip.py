from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedrag_cli.config import Config, load_config, load_config_with_source

SECRET = "s3cret-value-of-a-token"
BASE = """\
rag_system:
  retriever: {model: org/r}
  generator: {model: ./local-generator}
dataset:
  corpus: {path: c.jsonl}
  train: {path: sub/t.jsonl, columns: {query: frage}}
  test: {type: squad, path: ../s.json}
"""


def round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, overrides: tuple[str, ...] = ()
) -> tuple[Config, Config, str]:
    """Load a config, write it elsewhere, load that from a third folder; return both configs and what was written."""
    home, run, third = (tmp_path / name for name in ("home", "run", "third"))
    for folder in (home, run, third):
        folder.mkdir()
    (home / "c.yaml").write_text(BASE + text, encoding="utf-8")
    monkeypatch.chdir(home.parent)
    source = load_config_with_source(home / "c.yaml", overrides)
    written = source.to_yaml()
    (run / "config.yaml").write_text(written, encoding="utf-8")
    monkeypatch.chdir(third)
    return source.config, load_config(run / "config.yaml"), written


def test_the_written_config_is_equal_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "run: {name: '1e3', output_dir: out}\nevaluation: {metrics: [mrr, ndcg@3]}\ntrainer: {mode: alternating}\n"
    overrides = ("trainer.generator.lora=null", "rag_system.prompt.system='yes'", "dataset.validation.path=v.jsonl")
    first, second, written = round_trip(tmp_path, monkeypatch, text, overrides)
    assert second == first
    assert first.run.output_dir == str(tmp_path / "out")
    assert first.dataset.train.path == str(tmp_path / "home" / "sub" / "t.jsonl")
    assert first.dataset.test.path == str(tmp_path / "s.json")
    assert first.dataset.validation.path == str(tmp_path / "v.jsonl")
    assert first.rag_system.generator.model == str(tmp_path / "home" / "local-generator")
    assert "resamples: 10000" in written


@pytest.mark.parametrize(
    "text", ["\\${oc.env:HOME}", "costs $5 {context} \\${amount}", "a: b # c", "ünï\n\ttab: '\"", "~"]
)
def test_texts_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'
    first, second, _ = round_trip(
        tmp_path,
        monkeypatch,
        "run: {}\n",
        (f"rag_system.prompt.separator={quoted}",),
    )
    assert second == first
    assert first.rag_system.prompt.separator == text.replace("\\${", "${")


def test_environment_values_are_written_as_their_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRAG_TEST_TOKEN", SECRET)
    text = """\
  validation: {type: huggingface, path: org/set, revision: '${oc.env:FEDRAG_TEST_TOKEN}', name: '${.revision}'}
run: {name: '${dataset.validation.revision}'}
trainer: {generator: {lora: {target_modules: [q_proj, 'x-${oc.env:FEDRAG_TEST_TOKEN}']}}}
"""
    overrides = (
        "rag_system.retriever.query_prompt=pre ${run.name} post",
        "rag_system.prompt.system=${oc.env:FEDRAG_TEST_TOKEN}",
    )
    first, second, written = round_trip(tmp_path, monkeypatch, text, overrides)
    assert second == first
    assert first.rag_system.retriever.query_prompt == f"pre {SECRET} post"
    assert first.dataset.validation.name == SECRET
    assert SECRET not in written
    assert written.count("${oc.env:FEDRAG_TEST_TOKEN}") == 6
    monkeypatch.setenv("FEDRAG_TEST_TOKEN", "another")
    assert load_config(tmp_path / "run" / "config.yaml").run.name == "another"


def test_secret_in_a_referenced_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRAG_TEST_TOKEN", SECRET)
    text = """\
  validation: {type: huggingface, path: org/set, revision: '${oc.env:FEDRAG_TEST_TOKEN}'}
run: {name: x}
"""
    first, second, written = round_trip(tmp_path, monkeypatch, text, ("dataset.test=${dataset.validation}",))
    assert second == first
    assert first.dataset.test == first.dataset.validation
    assert SECRET not in written
    assert written.count("${oc.env:FEDRAG_TEST_TOKEN}") == 2


@pytest.mark.parametrize("place", ["sub/data", "../data", "."])
def test_relative_path_made_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("FEDRAG_TEST_DATA", place)
    text = "  validation: {path: '${oc.env:FEDRAG_TEST_DATA}/v.jsonl'}\n"
    first, second, written = round_trip(tmp_path, monkeypatch, text)
    assert second == first
    assert first.dataset.validation.path == str((tmp_path / "home" / place / "v.jsonl").resolve())
    assert f"path: {tmp_path}/home/${{oc.env:FEDRAG_TEST_DATA}}/v.jsonl" in written


def test_absolute_path_made_of_a_reference_that_lies_beside_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDRAG_TEST_DATA", str(tmp_path / "home" / "data"))
    text = "  validation: {path: '${oc.env:FEDRAG_TEST_DATA}/v.jsonl'}\n"
    first, second, written = round_trip(tmp_path, monkeypatch, text)
    assert second == first
    assert first.dataset.validation.path == str(tmp_path / "home" / "data" / "v.jsonl")
    assert "path: ${oc.env:FEDRAG_TEST_DATA}/v.jsonl" in written


def test_relative_paths_from_the_command_line_made_of_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDRAG_TEST_DATA", "data")
    overrides = (
        "dataset.validation.path=${oc.env:FEDRAG_TEST_DATA}/v.jsonl",
        "run.output_dir=${oc.env:FEDRAG_TEST_DATA}",
        "rag_system.retriever.model=./${oc.env:FEDRAG_TEST_DATA}/model",
    )
    first, second, _ = round_trip(tmp_path, monkeypatch, "", overrides)
    assert second == first
    assert first.dataset.validation.path == str(tmp_path / "data" / "v.jsonl")
    assert first.run.output_dir == str(tmp_path / "data")
    assert first.rag_system.retriever.model == str(tmp_path / "data" / "model")


def test_references_to_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRAG_TEST_DATA", "data")
    text = "  validation: {path: '${dataset.train.path}'}\n"
    overrides = ("dataset.train.path=${oc.env:FEDRAG_TEST_DATA}/t.jsonl", "run.name=${oc.env:FEDRAG_TEST_DATA}")
    first, second, _ = round_trip(tmp_path, monkeypatch, text, overrides)
    assert second == first
    assert first.dataset.validation.path == first.dataset.train.path == str(tmp_path / "data" / "t.jsonl")


def test_hub_id_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRAG_TEST_MODEL", "org/model")
    overrides = ("rag_system.retriever.model=${oc.env:FEDRAG_TEST_MODEL}", "evaluation.limit=${oc.decode:'7'}")
    first, second, written = round_trip(tmp_path, monkeypatch, "", overrides)
    assert second == first
    assert (first.rag_system.retriever.model, first.evaluation.limit) == ("org/model", 7)
    assert "model: ${oc.env:FEDRAG_TEST_MODEL}" in written


def test_writing_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRAG_TEST_DATA", "data")
    _, second, written = round_trip(tmp_path, monkeypatch, "run: {name: '${oc.env:FEDRAG_TEST_DATA}'}\n")
    source = load_config_with_source(tmp_path / "run" / "config.yaml")
    assert source.to_yaml() == written
    assert dataclasses.asdict(source.config) == dataclasses.asdict(second)
