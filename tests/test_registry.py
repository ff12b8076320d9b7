from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from fedrag_cli.config.fields import PositiveInt, config_class
from fedrag_cli.errors import ConfigError
from fedrag_cli.registry import KINDS, Registry, build, registry

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


@config_class
class MineConfig:
    """A component of the tests."""

    type: Literal["mine"] = "mine"
    """Names it."""
    size: PositiveInt = 1
    """How large."""


def build_mine(config: MineConfig, extra: int) -> int:
    return config.size + extra


def install(folder: Path, name: str, source: str, *, entry_point: str = "register") -> Path:
    """Put a package with an entry point into a folder, as pip does."""
    module = name.replace("-", "_")
    information = folder / f"{module}-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    entry = f"[fedrag.components]\n{name} = {module}:{entry_point}\n"
    (information / "entry_points.txt").write_text(entry, encoding="utf-8")
    return folder


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


OBJECTIVE = """\
from typing import Literal

from fedrag_cli.config.fields import config_class
from fedrag_cli.trainers.config import LMSupervisedConfig


@config_class
class MarginConfig(LMSupervisedConfig):
    type: Literal["margin"] = "margin"


def register(registry):
    registry.register("retriever_trainer", "margin", MarginConfig, "fedrag_margin:none", "ranks by a margin")
"""


def validation_problems(packages: Path, folder: Path, *overrides: str) -> list[tuple[str, str]]:
    config = folder / "c.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    done = fedrag(packages, "validate", str(config), "--json", "dataset.train=null", *overrides)
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    return [(p["path"], p["message"]) for p in error["problems"]] if "problems" in error else [("", error["message"])]


def test_plugin_objective_is_checked_as_those_that_it_derives_from(tmp_path: Path) -> None:
    packages = install(tmp_path / "packages", "fedrag-margin", OBJECTIVE)
    objective = ["trainer.retriever.type=margin", "trainer.retriever.top_k=1", "trainer.retriever.refresh_every=2"]
    assert validation_problems(packages, tmp_path, *objective) == [
        ("trainer.retriever.top_k", "must be at least 2: among one passage there is no ranking to learn"),
        (
            "trainer.retriever.refresh_every",
            "has no effect with train: query, whose index never goes stale; remove it",
        ),
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('on fire')", "RuntimeError: on fire"),
        ("return 7", "TypeError: 'int' object is not iterable"),
        ("return None", "TypeError: 'NoneType' object is not iterable"),
        ("return ['wrong']", "ValueError: too many values to unpack (expected 2)"),
        ("return [(path, 3)]", "TypeError: a message is no text"),
        ("return [((None,), 'wrong')]", "TypeError: a key path has something else than names and numbers"),
    ],
)
def test_plugin_whose_check_is_broken_is_named(tmp_path: Path, body: str, reason: str) -> None:
    method = f"\n    def check(self, config, path):\n        {body}\n"
    packages = install(
        tmp_path / "packages", "fedrag-margin", OBJECTIVE.replace('"margin"\n\n\ndef', f'"margin"\n{method}\n\ndef')
    )
    message = f"The check of the retriever_trainer 'margin' of 'fedrag-margin' fails: {reason}"
    assert validation_problems(packages, tmp_path, "trainer.retriever.type=margin") == [("", message)]


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


def test_register_and_build() -> None:
    fresh = Registry()
    fresh.register("corpus", "mine", MineConfig, f"{__name__}:build_mine", "of the tests")
    component = fresh.get("corpus", "mine")
    assert (component.kind, component.name, component.origin) == ("corpus", "mine", "fedrag-cli")
    assert component.load_builder() is build_mine
    assert fresh.of_kind("corpus") == {"mine": component}
    assert fresh.all() == [component]


def test_name_clash() -> None:
    fresh = Registry()
    fresh.register("corpus", "mine", MineConfig, "a:b", "")
    fresh.register("examples", "mine", MineConfig, "a:b", "")
    with pytest.raises(ConfigError, match=r"registers the corpus 'mine', which 'fedrag-cli' has registered already"):
        fresh.register("corpus", "mine", MineConfig, "a:b", "")


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"'fedrag-cli' registers the unknown kind 'retreiver'") as caught:
        Registry().register("retreiver", "mine", MineConfig, "a:b", "")
    assert caught.value.hint == f"Kinds: {', '.join(KINDS)}."


def test_config_class_without_a_fitting_type_field() -> None:
    @config_class
    class NoType:
        size: int = 1

    class NoDataclass:
        type: Literal["mine"] = "mine"

    for owner, name in ((NoType, "mine"), (NoDataclass, "mine"), (MineConfig, "yours")):
        with pytest.raises(ConfigError, match=rf"The config class of the corpus '{name}' needs a field `type: Literal"):
            Registry().register("corpus", name, owner, "a:b", "")


@pytest.mark.parametrize("builder", ["fedrag_no_such_module:x", "json:no_such_function", "json:loads.nothing"])
def test_builder_that_cannot_be_imported(builder: str) -> None:
    fresh = Registry()
    fresh.register("corpus", "mine", MineConfig, builder, "")
    with pytest.raises(ConfigError, match=rf"The builder '{builder}' of the corpus 'mine' cannot be imported"):
        fresh.get("corpus", "mine").load_builder()


def test_unknown_component() -> None:
    with pytest.raises(ConfigError, match=r"There is no retriever_trainer of type 'x'") as caught:
        registry().get("retriever_trainer", "x")
    assert caught.value.hint == "Known types: contrastive, emdr2, loop, lsr, pdist."
    with pytest.raises(ConfigError, match=r"There is no corpus of type 'mine'"):
        build("corpus", MineConfig())


def test_every_built_in_component_can_be_imported_and_has_help_for_every_setting() -> None:
    from fedrag_cli.config.json_schema import component_settings

    for component in registry().all():
        assert callable(component.load_builder())
        assert component.help
        assert [s["name"] for s in component_settings(component.config_class) if not s["help"]] == [], component
