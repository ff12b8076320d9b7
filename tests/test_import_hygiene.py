from __future__ import annotations

import gc
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import fedrag_cli
from fedrag_cli.cli.main import main

HEAVY = ("torch", "transformers", "datasets", "sentence_transformers", "peft", "flwr", "accelerate", "numpy")
CONFIG = """\
rag_system: {retriever: {model: org/r}, generator: {model: org/g}}
dataset: {corpus: {path: c.jsonl}, train: {path: t.jsonl}}
"""
RUN_COMMAND = """\
import json, sys
from fedrag_cli.cli.main import main
code = main(sys.argv[2:])
json.dump({"code": code, "modules": sorted(sys.modules)}, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["report", "--help"],
        ["--version"],
        ["validate", "c.yaml"],
        ["validate", "c.yaml", "run.sed=3"],
        ["components"],
        ["components", "lsr", "--json"],
        ["schema"],
        ["init", "new"],
    ],
    ids=" ".join,
)
def test_commands_that_load_no_model_import_no_model_library(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", RUN_COMMAND, str(report), *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["code"] == (2 if "run.sed=3" in arguments else 0)
    assert [name for name in (*HEAVY, "rich.progress", "rich.live") if name in found["modules"]] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["index", "c.yaml"],
        ["index", "stored.yaml", "rag_system.knowledge_store.type=faiss"],
        ["index", "stored.yaml", "rag_system.knowledge_store.path=full"],
        ["index", "stored.yaml", "--to", "c.yaml"],
        ["index", "stored.yaml", "--to", "missing.yaml"],
        ["query", "c.yaml", "what ?", "rag_system.generator=null"],
        ["evaluate", "c.yaml"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_with_a_config_is_told_before_a_model_library_is_imported(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "stored.yaml").write_text("extends: c.yaml\nrag_system: {knowledge_store: {path: store}}\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", RUN_COMMAND, str(report), *arguments]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["code"] == 2, done.stderr
    assert [name for name in HEAVY if name in found["modules"]] == []


@pytest.mark.parametrize("module", ["compare", "html"])
def test_what_only_reads_runs_needs_no_model_library(module: str) -> None:
    program = f"import sys, fedrag_cli.reports.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(HEAVY) & set(done.stdout.split()) <= {"numpy"}


def test_importing_the_package_imports_next_to_nothing() -> None:
    program = "import sys; before = set(sys.modules); import fedrag_cli; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    new = done.stdout.split()
    assert [name for name in new if name.startswith("fedrag_cli")] == ["fedrag_cli"]
    assert {name.partition(".")[0] for name in new} <= {"fedrag_cli", *sys.stdlib_module_names}
    assert len(new) < 40


@pytest.mark.parametrize("name", fedrag_cli.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(fedrag_cli, name).__name__ == name
    assert name in dir(fedrag_cli)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'fedrag_cli' has no attribute 'nothing'"):
        _ = fedrag_cli.nothing


def test_type_information_is_marked() -> None:
    assert resources.files(fedrag_cli).joinpath("py.typed").is_file()


def test_garbage_is_collected_again_when_long_work_begins_and_after_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("fedrag_cli.cli.render.Renderer.reporter", lambda self: seen.append(gc.isenabled()))
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    assert main(["index", str(config), f"rag_system.knowledge_store.path={tmp_path / 'store'}"]) != 0
    assert seen == [True]
    assert gc.isenabled()


WITHOUT_UNIX = """\
import importlib, os, pkgutil, signal, sys

def import_all():
    package = importlib.import_module("fedrag_cli")
    for module in pkgutil.walk_packages(package.__path__, "fedrag_cli."):
        if module.name != "fedrag_cli.__main__":
            importlib.import_module(module.name)

# First with all there is, because other libraries ask for the system before they import what it alone has.
import_all()
for name in [name for name in sys.modules if name.partition(".")[0] == "fedrag_cli"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None
for module, names in {
    os: "getuid geteuid fork fchmod sysconf O_DIRECTORY O_NOFOLLOW getpgid killpg uname",
    signal: "SIGHUP SIGALRM SIGUSR1 SIGCHLD alarm pause",
}.items():
    for name in names.split():
        delattr(module, name)
import_all()
from fedrag_cli.cli.main import main
sys.exit(main(["validate", sys.argv[1]]))
"""


@pytest.mark.slow
def test_modules_and_plain_commands_do_without_what_only_unix_has(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_UNIX, str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stderr
