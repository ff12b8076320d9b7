"""Runs that are killed with -9 or interrupted, and resumed, end with the numbers of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config_with_source
from fedrag_cli.errors import DataError
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.metrics_log import latest_by_step, read_events

FEDRAG = [sys.executable, "-W", "ignore", "-m", "fedrag_cli"]
ALTERNATING = {
    "mode": "alternating",
    "retriever": {
        "top_k": 4, "batch_size": 2, "learning_rate": 1e-3, "epochs": 2, "save_every": 3,
        "validation": {"metric": "mrr", "every": 4},
    },
    "generator": {"top_k": 2, "batch_size": 4, "learning_rate": 1e-2, "epochs": 2, "lora": {"dropout": 0.1}},
}  # fmt: skip


def _start(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FEDRAG, "train", str(config), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _resume(run: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*FEDRAG, "resume", str(run), "--json"], capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _run_of(config: Path) -> Path:
    (run,) = (config.parent / "runs" / "tiny").iterdir()
    return run


def _wait_for(process: subprocess.Popen[str], config: Path, ready: Callable[[Path], bool]) -> Path:
    """Wait until something is true of the run directory, and return the directory."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        folders = list((config.parent / "runs" / "tiny").glob("*"))
        if folders and ready(folders[0]):
            return folders[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError("the run did not get that far")


def _numbers(summary: dict[str, Any]) -> dict[str, Any]:
    changing = ("seconds", "run_dir", "command", "metrics")
    return {name: value for name, value in summary.items() if name not in changing}


def _weights(run: Path) -> dict[str, torch.Tensor]:
    files = [*run.glob("retriever/**/*.safetensors"), *run.glob("generator/*.safetensors")]
    assert len(files) == 3
    return {f"{file.relative_to(run)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def _assert_equal_runs(run: Path, other: Path) -> None:
    first, second = (_numbers(json.loads((path / "summary.json").read_text())) for path in (run, other))
    assert first == second
    weights = _weights(other)
    for name, tensor in _weights(run).items():
        assert torch.equal(weights[name], tensor), name
    for event in ("train_step", "validation"):
        logs = [latest_by_step(read_events(path / "metrics.jsonl"), event) for path in (run, other)]
        without_time = [[{k: v for k, v in entry.items() if k != "time"} for entry in log] for log in logs]
        assert without_time[0] == without_time[1]
    assert not list(run.rglob("*.tmp"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """A folder with a config, its data and a run that was left alone; tests copy config and data."""
    return tmp_path_factory.mktemp("undisturbed")


def _prepare(write_config: Callable[..., Path], undisturbed: Path) -> tuple[Path, Path]:
    """Return a fresh config and the run directory of the undisturbed run of the same config."""
    config = write_config("disturbed", trainer=ALTERNATING)
    kept = undisturbed / "run"
    if not kept.exists():
        reference = write_config("reference", trainer=ALTERNATING)
        process = _start(reference)
        output = process.communicate(timeout=300)
        assert process.returncode == 0, output[1]
        shutil.move(_run_of(reference), kept)
    return config, kept


def _has_event(name: str, count: int = 1, phase: str = "") -> Callable[[Path], bool]:
    def ready(run: Path) -> bool:
        file = run / "metrics.jsonl"
        if not file.exists():
            return False
        lines = file.read_text(encoding="utf-8").splitlines()
        return sum(f'"{name}"' in line and phase in line for line in lines) >= count

    return ready


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "while scoring": lambda run: any(run.glob("checkpoints/*/likelihoods-*.jsonl")),
    "when the untuned weights were validated": _has_event("validation", 1, "1-retriever"),
    "in the middle of the retriever": _has_event("train_step", 6, "1-retriever"),
    "while a checkpoint is written": lambda run: any(run.glob("checkpoints/1-retriever/checkpoint-9")),
    "between the phases": lambda run: any(run.glob("checkpoints/1-retriever/finished")),
    "in the middle of the generator": _has_event("train_step", 3, "2-generator"),
    "while the models are saved": lambda run: any(run.glob(".retriever*")) or (run / "retriever").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the middle of the retriever", "in the middle of the generator"])
def test_a_killed_run_resumes_to_the_same_numbers(
    write_config: Callable[..., Path], undisturbed: Path, moment: str
) -> None:
    _kill_and_resume(write_config, undisturbed, moment)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [name for name in MOMENTS if "middle" not in name])
def test_a_run_killed_at_other_moments_resumes_to_the_same_numbers(
    write_config: Callable[..., Path], undisturbed: Path, moment: str
) -> None:
    _kill_and_resume(write_config, undisturbed, moment)


def _kill_and_resume(write_config: Callable[..., Path], undisturbed: Path, moment: str) -> None:
    config, reference = _prepare(write_config, undisturbed)
    process = _start(config)
    run = _wait_for(process, config, MOMENTS[moment])
    process.kill()
    process.communicate()
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    _resume(run)
    _assert_equal_runs(run, reference)


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(write_config: Callable[..., Path], undisturbed: Path) -> None:
    config, reference = _prepare(write_config, undisturbed)
    process = _start(config)
    run = _wait_for(process, config, _has_event("train_step", 5, "1-retriever"))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "a checkpoint is saved" in errors
    assert f"fedrag resume {run}" in errors
    assert json.loads(output)["error"]["exit_code"] == 130
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert any(run.glob("checkpoints/1-retriever/checkpoint-*/complete.json"))
    _resume(run)
    _assert_equal_runs(run, reference)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(write_config: Callable[..., Path], undisturbed: Path, capsys: Any) -> None:
    config, _ = _prepare(write_config, undisturbed)
    process = _start(config)
    run = _wait_for(process, config, _has_event("validation", 1, "1-retriever"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    newest = max(run.glob("checkpoints/1-retriever/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["resume", str(run)]) == 3
    message = " ".join(capsys.readouterr().err.split())
    assert f"The checkpoint '{newest}' is damaged: model.safetensors differs" in message
    assert f"Remove the folder '{newest}'" in message


@pytest.mark.slow
def test_a_run_whose_data_has_changed_is_not_resumed(
    write_config: Callable[..., Path], undisturbed: Path, capsys: Any
) -> None:
    config, _ = _prepare(write_config, undisturbed)
    process = _start(config)
    run = _wait_for(process, config, _has_event("train_step", 2, "1-retriever"))
    process.kill()
    process.communicate()
    lines = (config.parent / "train.jsonl").read_text().splitlines()
    (config.parent / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert main(["resume", str(run)]) == 1
    assert "The data of this run has changed since it started: train." in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_not_work_in_one_run_directory(
    write_config: Callable[..., Path], undisturbed: Path, capsys: Any
) -> None:
    config, _ = _prepare(write_config, undisturbed)
    process = _start(config)
    run = _wait_for(process, config, _has_event("train_step", 1, "1-retriever"))
    assert main(["resume", str(run)]) == 1
    assert "Another process is working in" in capsys.readouterr().err
    process.kill()
    process.communicate()


FROM_OUTSIDE = [
    "trainer.retriever.lm_temperature=${oc.env:FEDRAG_TEMPERATURE,0.1}",
    "trainer.retriever.retriever_temperature=${trainer.retriever.lm_temperature}",
    "rag_system.prompt.system='Be ${oc.env:FEDRAG_MANNER}, ${run.name}.'",
    "rag_system.knowledge_store={type: qdrant, url: 'http://127.0.0.1:1', api_key: '${oc.env:FEDRAG_SECRET}'}",
    "trainer.generator.lora=${oc.decode:${oc.env:FEDRAG_LORA,null}}",
    "run.output_dir=${oc.env:FEDRAG_RUNS}",
]
OF_KIND: dict[str, dict[str, Any]] = {
    "training": {},
    "evaluation": {"evaluation": {"of": None}},
    "server": {"federation": {"role": "server", "address": "127.0.0.1:1"}},
    "client": {"federation": {"role": "client", "address": "127.0.0.1:1"}},
    "simulation": {"federation": {"role": "simulation", "clients": 2}},
}


def _run_from_outside(config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for name, value in {"MANNER": "quick", "SECRET": "swordfish", "RUNS": str(folder)}.items():
        monkeypatch.setenv(f"FEDRAG_{name}", value)
    source = load_config_with_source(config, FROM_OUTSIDE)
    outside = source.outside_values()
    return RunDirectory.create(str(folder), "tiny", source.to_yaml(), command=[], seed=1, outside=outside)


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_run_is_not_resumed_where_the_environment_gives_other_settings(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = _run_from_outside(write_config(), tmp_path / "kept", monkeypatch)
    run.update_manifest(**OF_KIND[kind])
    monkeypatch.setenv("FEDRAG_TEMPERATURE", "0.0001")
    monkeypatch.setenv("FEDRAG_SECRET", "marlin")
    assert main(["resume", str(run.path)]) == 2
    shown = capsys.readouterr().err
    for key in (
        "trainer.retriever.lm_temperature (${oc.env:FEDRAG_TEMPERATURE,0.1}) was 0.1, is 0.0001",
        "trainer.retriever.retriever_temperature (${oc.env:FEDRAG_TEMPERATURE,0.1}) was 0.1, is 0.0001",
        "rag_system.knowledge_store.api_key (${oc.env:FEDRAG_SECRET})",
    ):
        assert key in shown
    assert "rag_system.prompt" not in shown
    assert "marlin" not in shown


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("MANNER", "slow", "rag_system.prompt.system (Be ${oc.env:FEDRAG_MANNER}, tiny.)."),
        ("LORA", "{r: 4}", "trainer.generator.lora (${oc.decode:${oc.env:FEDRAG_LORA,null}})."),
        ("TEMPERATURE", "0.10", None),
        ("RUNS", "elsewhere", None),
        ("SECRET", None, "the environment variable 'FEDRAG_SECRET' is not set"),
    ],
)
def test_what_the_environment_gives_is_compared_by_value(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str | None,
    key: str | None,
) -> None:
    run = _run_from_outside(write_config(), tmp_path / "kept", monkeypatch)
    kept = "".join(path.read_text(encoding="utf-8") for path in run.path.iterdir() if path.is_file())
    assert not [text for text in ("quick", "swordfish") if text in kept]
    if value is None:
        monkeypatch.delenv(f"FEDRAG_{variable}")
    else:
        monkeypatch.setenv(f"FEDRAG_{variable}", value)
    if key is None:
        run.require_same_outside(load_config_with_source(run.config_file).outside_values())
        return
    assert main(["resume", str(run.path)]) == 2
    assert key in capsys.readouterr().err


def test_a_reference_that_was_replaced_in_the_runs_config_is_meant(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run_from_outside(write_config(), tmp_path / "kept", monkeypatch)
    text = run.config_file.read_text(encoding="utf-8")
    assert text.count("${oc.env:FEDRAG_TEMPERATURE,0.1}") == 2
    run.config_file.write_text(text.replace("${oc.env:FEDRAG_TEMPERATURE,0.1}", "0.2"), encoding="utf-8")
    run.require_same_outside(load_config_with_source(run.config_file).outside_values())


@pytest.mark.parametrize("damaged", [5, {}, {"salt": "no hex", "settings": {}}, {"salt": "00", "settings": {"a": 1}}])
def test_a_damaged_record_of_the_environment_is_told(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: Any
) -> None:
    run = _run_from_outside(write_config(), tmp_path / "kept", monkeypatch)
    run.update_manifest(outside=damaged)
    with pytest.raises(DataError, match="its section 'outside' is damaged"):
        run.require_same_outside({})


def test_a_run_whose_model_has_changed_is_not_resumed(
    write_config: Callable[..., Path], models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    model = tmp_path / "retriever"
    shutil.copytree(models["retriever"], model)
    config = write_config(
        rag_system={"retriever": {"model": str(model)}, "generator": {"model": str(models["generator"])}}
    )
    assert main(["train", str(config), "--json"]) == 0
    run = Path(json.loads(capsys.readouterr().out)["run_dir"])
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    shutil.rmtree(model)
    shutil.copytree(models["other_retriever"], model)
    assert main(["resume", str(run)]) == 1
    assert "The base models of this run have changed since it started: retriever" in capsys.readouterr().err
