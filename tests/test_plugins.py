"""Components of third parties, which join by an entry point, serve every command as the built-in ones do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import data_rows
from plugins import install, installed
from torch import Tensor

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.config.json_schema import config_json_schema
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.errors import EXIT_INTERRUPTED, ConfigError
from fedrag_cli.runs.metrics_log import read_events

PLUGIN = '''\
from typing import Literal

from fedrag_cli.config.fields import PathStr, PositiveInt, config_class


@config_class
class TriviaConfig:
    """Made-up questions."""

    type: Literal["trivia"] = "trivia"
    """Names this source."""
    path: PathStr
    """Where they are."""
    count: PositiveInt = 4
    """How many."""


def load(config):
    from fedrag_cli.data.examples import Example

    return [Example(str(n), f"question {n}", (config.path,)) for n in range(config.count)]


def register(registry):
    registry.register("examples", "trivia", TriviaConfig, "fedrag_trivia:load", "made-up questions")
'''
CONFIG = """\
rag_system: {retriever: {model: org/r}, generator: {model: org/g}}
dataset:
  corpus: {path: c.jsonl}
  train: {type: trivia, path: questions, count: 2}
"""
BUILD_TRAIN = """\
import sys
from fedrag_cli import load_config
from fedrag_cli.registry import build
print(build("examples", load_config(sys.argv[1]).dataset.train)[1].response)
"""


def python(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that sees the packages in a folder."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def fedrag(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run fedrag in a process that sees the packages in a folder."""
    return python(folder, "import sys; from fedrag_cli.cli.main import main; sys.exit(main())", *arguments)


def test_plugin_is_listed_validated_and_built(tmp_path: Path) -> None:
    packages = install(tmp_path / "packages", "fedrag-trivia", PLUGIN)
    done = fedrag(packages, "components", "trivia", "--json")
    assert done.returncode == 0, done.stderr
    [component] = json.loads(done.stdout)["components"]
    assert component == {
        "kind": "examples",
        "type": "trivia",
        "help": "made-up questions",
        "origin": "fedrag-trivia",
        "settings": [
            {"name": "path", "required": True, "default": None, "help": "Where they are."},
            {"name": "count", "required": False, "default": 4, "help": "How many."},
        ],
    }
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    for name in ("c.jsonl", "questions"):
        (tmp_path / name).touch()
    done = fedrag(packages, "validate", str(config))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{config} is valid (mode: retriever).\n"
    built = python(packages, BUILD_TRAIN, str(config))
    assert built.stdout == f"{tmp_path / 'questions'}\n"


def test_plugin_errors_are_reported_like_those_of_built_in_components(tmp_path: Path) -> None:
    packages = install(tmp_path / "packages", "fedrag-trivia", PLUGIN)
    config = tmp_path / "c.yaml"
    wrong = "  train:\n    type: trivia\n    cuont: 2\n  test: {type: trivai}\n"
    config.write_text(CONFIG.replace("  train: {type: trivia, path: questions, count: 2}\n", wrong), encoding="utf-8")
    done = fedrag(packages, "validate", str(config), "--json")
    assert done.returncode == 2
    assert [(p["line"], p["path"], p["message"]) for p in json.loads(done.stdout)["error"]["problems"]] == [
        (4, "dataset.train.path", "is required"),
        (6, "dataset.train.cuont", "is no setting here (did you mean 'count'?)"),
        (7, "dataset.test.type", "there is no type 'trivai' (did you mean 'trivia'?)"),
    ]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('no such library')\n", "ImportError: no such library"),
        ("def register(registry)\n", "SyntaxError: "),
        ("x = 1\n", "AttributeError: "),
        ("def register():\n    pass\n", "TypeError: "),
        ("def register(registry):\n    raise RuntimeError('on fire')\n", "RuntimeError: on fire"),
    ],
)
def test_broken_plugin(tmp_path: Path, source: str, reason: str) -> None:
    packages = install(tmp_path, "fedrag-broken", source)
    done = fedrag(packages, "components")
    assert done.returncode == 2
    message = f"Error: The plug-in 'fedrag-broken' of 'fedrag-broken' cannot be loaded: {reason}"
    assert done.stderr.startswith(message)
    assert done.stderr.endswith("What to do: Repair or uninstall 'fedrag-broken'.\n")
    assert "Traceback" not in done.stderr


def test_plugin_whose_builder_is_missing_is_named_when_it_is_built(tmp_path: Path) -> None:
    packages = install(tmp_path, "fedrag-trivia", PLUGIN.replace("fedrag_trivia:load", "fedrag_trivia:nothing"))
    assert fedrag(packages, "components").returncode == 0
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    assert fedrag(packages, "validate", str(config)).returncode == 0
    done = python(packages, BUILD_TRAIN, str(config))
    assert done.returncode == 1
    assert "ConfigError: The builder 'fedrag_trivia:nothing' of the examples 'trivia' cannot be imported" in done.stderr
    assert "Check the installation of 'fedrag-trivia'" in done.stderr


def test_two_plugins_that_register_the_same_name(tmp_path: Path) -> None:
    install(tmp_path, "fedrag-trivia", PLUGIN)
    install(tmp_path, "fedrag-xtrivia", PLUGIN)
    done = fedrag(tmp_path, "components")
    assert done.returncode == 2
    assert "registers the examples 'trivia', which 'fedrag-" in done.stderr
    assert "What to do: Uninstall one of 'fedrag-" in done.stderr


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """Install the plug-in of `plugin_components`."""
    with installed(tmp_path / "packages", "fedrag-parts", entry_point="plugin_components:register"):
        yield


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path, parts: None) -> Path:
    """A config whose passages, questions and objective are those of the plug-in."""
    rows = data_rows()
    passages = [f"{row['id']} | {row['text']}" for row in rows["corpus"]]
    (tmp_path / "corpus.txt").write_text("\n".join(passages), encoding="utf-8")
    for split in ("train", "validation", "test"):
        answers = [(row, row["response"]) for row in rows[split]]
        lines = [
            f"{row['query']} | {answer if isinstance(answer, str) else answer[0]} | {row['relevant_ids'][0]}"
            for row, answer in answers
        ]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    names = ("corpus", "train", "validation", "test")
    objective = {
        "type": "margin",
        "margin": 0.25,
        "top_k": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "epochs": 2,
        "save_every": 2,
        "validation": {"keep_best": False},
    }
    return write_config(
        dataset={name: {"type": "lines", "path": f"{name}.txt"} for name in names}, trainer={"retriever": objective}
    )


def problems(config: Path, *overrides: str) -> list[tuple[str, str]]:
    """Return key path and message of what is wrong with a config."""
    with pytest.raises(InvalidConfigError) as caught:
        load_config(config, overrides)
    return [(problem.path, problem.message) for problem in caught.value.problems]


def test_corpus_examples_and_objective_of_a_plugin_serve_every_command(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == code
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    assert run("validate", config)["warnings"] == []
    store = f"rag_system.knowledge_store.path={tmp_path / 'store'}"
    assert run("index", config, store)["passages"] == 24
    from plugin_objective import MarginTrainer

    seen: list[tuple[Tensor, Tensor]] = []
    stop_at = [0]
    loss = MarginTrainer._loss

    def watched(self: MarginTrainer, scores: Tensor, lm_scores: Tensor) -> Tensor:
        seen.append((scores.detach(), lm_scores))
        if len(seen) == stop_at[0]:
            raise KeyboardInterrupt
        return loss(self, scores, lm_scores)

    monkeypatch.setattr(MarginTrainer, "_loss", watched)
    whole = run("train", config, store)
    assert whole["versions"]["fedrag-parts"] == "1.0"
    rows = [
        sum(max(0.0, 0.25 - row[said.index(max(said))] + score) for score in row)
        for row, said in zip(seen[0][0].tolist(), seen[0][1].tolist(), strict=True)
    ]
    events = read_events(Path(whole["run_dir"]) / "metrics.jsonl")
    first = next(event for event in events if event["event"] == "train_step")
    assert first["loss"] == pytest.approx(sum(rows) / len(rows))
    assert whole["settings"]["retriever"]["margin"] == 0.25

    seen.clear()
    stop_at[0] = 8
    assert main(["train", str(config), store, f"run.output_dir={tmp_path / 'stopped'}"]) == EXIT_INTERRUPTED
    monkeypatch.undo()
    [stopped] = (tmp_path / "stopped" / "tiny").iterdir()
    resumed = run("resume", stopped)
    assert (resumed["loss"], resumed["steps"]) == (whole["loss"], whole["steps"])
    assert resumed["differences"] == whole["differences"]
    after = {item["metric"]: item["after"] for item in whole["differences"]}
    evaluated = run("evaluate", whole["run_dir"])["metrics"]
    assert {name: found["mean"] for name, found in evaluated.items()} == after


def test_objective_of_a_plugin_is_checked_as_those_that_it_derives_from(config: Path) -> None:
    overrides = ["trainer.retriever.top_k=1", "trainer.retriever.refresh_every=2"]
    ranking = "must be at least 2: among one passage there is no ranking to learn"
    index = "has no effect with train: query, whose index never goes stale; remove it"
    assert sorted(problems(config, *overrides)) == [
        ("trainer.retriever.refresh_every", index),
        ("trainer.retriever.top_k", ranking),
    ]
    # Only the sides that are tuned are checked.
    load_config(config, [*overrides, "trainer.mode=generator"])


def test_settings_of_a_plugin_are_in_the_schema(parts: None) -> None:
    properties = config_json_schema()["$defs"]["LinesCorpusConfig"]["properties"]
    assert {name: setting["description"] for name, setting in properties.items()} == {
        "path": "The file.",
        "separator": "What separates the parts of a line.",
        "type": "Names this source.",
    }


def test_checks_of_a_plugins_sources_name_the_setting(config: Path) -> None:
    override = 'dataset.test.separator="\\n"'
    assert problems(config, override) == [("dataset.test.separator", "must not have a line end")]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (7, "TypeError: 'int' object is not iterable"),
        (None, "TypeError: 'NoneType' object is not iterable"),
        (["wrong"], "ValueError: too many values to unpack (expected 2)"),
        ([((), 3)], "TypeError: a message is no text"),
        ([((None,), "wrong")], "TypeError: a key path has something else than names and numbers"),
        (RuntimeError("on fire"), "RuntimeError: on fire"),
    ],
)
def test_plugin_whose_check_is_broken_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, found: Any, reason: str
) -> None:
    import plugin_components

    def check(self: object, config: object, path: object) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(plugin_components.MarginConfig, "check", check)
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert caught.value.message == f"The check of the retriever_trainer 'margin' of 'fedrag-parts' fails: {reason}"
    assert caught.value.hint == "Repair or uninstall 'fedrag-parts'."


def test_config_that_lacks_what_its_kind_is_asked_for_is_refused(tmp_path: Path) -> None:
    source = PLUGIN.replace('"examples"', '"strategy"')
    done = fedrag(install(tmp_path, "fedrag-trivia", source), "components")
    assert done.returncode == 2
    base = "fedrag_cli.federated.config.StrategyConfig"
    message = f"The config class of the strategy 'trivia' of 'fedrag-trivia' does not derive from {base}."
    assert done.stderr == f"Error: {message}\nWhat to do: Repair or uninstall 'fedrag-trivia'.\n"
