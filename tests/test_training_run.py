from __future__ import annotations

import json
import os
import subprocess
import sys
import termios
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config, load_config_with_source
from fedrag_cli.errors import RunInterruptedError
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporting import SilentReporter
from fedrag_cli.trainer_managers.training_run import resume_training, start_training


def test_train_writes_a_whole_run_directory(write_config: Callable[..., Path], capsys) -> None:
    config = write_config()
    assert main(["train", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run = Path(summary["run_dir"])
    assert summary["status"] == "done"
    assert {item["metric"] for item in summary["differences"]} == {"mrr", "recall@1", "recall@5", "ndcg@10"}
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "README.md", "plots/loss.png"):
        assert (run / name).is_file(), name
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"


def test_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path], capsys) -> None:
    """Through the command line: batch 1 with 8 accumulated equals batch 8, for both sides."""
    from safetensors.torch import load_file

    def train(folder: str, *overrides: str) -> dict[str, torch.Tensor]:
        config = write_config(folder, trainer={"mode": "alternating"})
        common = [
            f"trainer.{side}.{setting}"
            for side in ("retriever", "generator")
            for setting in ("optimizer=sgd", "learning_rate=0.05", "validation.every=never")
        ]
        assert main(["train", str(config), "--json", *common, *overrides]) == 0
        run = Path(json.loads(capsys.readouterr().out)["run_dir"])
        files = [*run.glob("retriever/query*/*.safetensors"), *run.glob("generator/*.safetensors")]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    sides = ("retriever", "generator")
    large = train("large", *(f"trainer.{side}.batch_size=8" for side in sides))
    accumulated = [f"trainer.{side}.{s}" for side in sides for s in ("batch_size=1", "gradient_accumulation_steps=8")]
    small = train("small", *accumulated)
    assert large
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def test_the_tuned_models_load_in_their_own_libraries(write_config: Callable[..., Path], capsys) -> None:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM

    config = write_config(trainer={"mode": "alternating"})
    assert main(["train", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run = Path(summary["run_dir"])
    retriever = SentenceTransformer(str(run / "retriever"), device="cpu")
    query, passage = retriever.encode_query(["the cat"]), retriever.encode_document(["the cat"])
    assert abs(query - passage).max() > 1e-5
    base = AutoModelForCausalLM.from_pretrained(load_config(config).rag_system.generator.model)
    adapted = PeftModel.from_pretrained(base, str(run / "generator"))
    assert any("lora" in name for name, _ in adapted.named_parameters())
    assert not [file for file in run.rglob("*") if file.suffix == ".bin" and "checkpoints" not in file.parts]


def test_the_time_of_a_resumed_run_counts_all_its_parts(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    source = load_config_with_source(write_config())
    with monkeypatch.context() as patched:
        patched.setattr("fedrag_cli.trainer_managers.training_run.save_models", interrupt)
        with pytest.raises(RunInterruptedError):
            start_training(source, ["fedrag"], SilentReporter())
    (path,) = Path(source.config.run.output_dir).glob("*/*")
    run = RunDirectory.open(path)
    events = run.events()
    assert events[-1]["event"] == "stopped"
    # As if the first part had begun two hours earlier than it has.
    began = datetime.fromisoformat(events[0]["time"]) - timedelta(hours=2)
    events[0]["time"] = began.isoformat()
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    summary = resume_training(run, load_config_with_source(run.config_file), SilentReporter())
    assert 7200 < summary["seconds"] < 7200 + 600


def test_a_terminal_shows_our_bars_alone(write_config: Callable[..., Path]) -> None:
    terminal, other_end = os.openpty()
    # Bars draw nothing on a terminal without columns.
    termios.tcsetwinsize(terminal, (40, 200))
    config = write_config(trainer={"mode": "generator"})
    settings = ("trainer.generator.lora=null", "trainer.generator.max_steps=1", "evaluation.metrics=[mrr]")
    environment = {name: value for name, value in os.environ.items() if "TQDM" not in name and "BARS" not in name}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fedrag_cli", "train", str(config), *settings],
        stderr=other_end,
        env=environment | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(other_end)
    shown = b""
    while part := _read(terminal):
        shown += part
    os.close(terminal)
    assert process.wait(60) == 0, shown.decode()
    assert "1-generator" in shown.decode()
    for bar in ("Loading weights", "Writing model shards", "it/s]"):
        assert bar not in shown.decode()


def _read(terminal: int) -> bytes:
    """Return what comes next; nothing where the other end is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
