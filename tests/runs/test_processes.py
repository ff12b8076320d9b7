"""Training in several processes: what they tell each other, and that two give the numbers of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from fedrag_cli.cli.main import main
from fedrag_cli.errors import (
    EXIT_DATA,
    EXIT_USAGE,
    ConfigError,
    DataError,
    ModelError,
    OtherProcessError,
    TrainingError,
)
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.models import ModelLocation, choose_device, placement_options
from fedrag_cli.runs.processes import Processes, resume_command
from fedrag_cli.trainers.huggingface.checks import StepDiagnostics

TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
SGD = {"optimizer": "sgd", "learning_rate": 1e-2}


def in_threads(*works: Callable[[Processes], Any]) -> list[Any]:
    """Run a function for each of several processes, which are threads here, and return results or errors."""
    store, results = distributed.HashStore(), [None] * len(works)

    def run(number: int) -> None:
        processes = Processes(number, len(works), store)
        try:
            with processes.failures_shared():
                results[number] = works[number](processes)
        except BaseException as error:  # noqa: BLE001
            results[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_what_the_main_process_does_is_done_once_and_heard_by_all() -> None:
    done: list[str] = []

    def work(processes: Processes) -> list[Any]:
        def count() -> int:
            done.append(f"process {processes.rank}")
            return len(done)

        return [processes.run_on_rank_0(count), processes.run_on_rank_0(count), processes.run_on_rank_0(lambda: None)]

    assert in_threads(work, work, work) == [[1, 2, None]] * 3
    assert done == ["process 0"] * 2
    assert Processes().run_on_rank_0(lambda: 7) == 7


def test_a_failure_of_the_main_process_ends_the_waiting_of_the_others() -> None:
    def fail(processes: Processes) -> None:
        raise DataError("The file is empty.", "Fill it.")

    own, heard = in_threads(fail, lambda processes: processes.receive())
    assert isinstance(own, DataError)
    assert isinstance(heard, OtherProcessError)
    assert str(heard) == "Process 0 of this training failed: The file is empty.\nFill it."
    assert heard.exit_code == EXIT_DATA


def test_an_error_of_torch_is_traced_to_the_process_that_failed() -> None:
    failed = threading.Event()

    def lose(processes: Processes) -> None:
        failed.wait(10)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")

    def fail(processes: Processes) -> None:
        try:
            raise MemoryError("no room")
        finally:
            threading.Timer(0.2, failed.set).start()

    lost, own = in_threads(lose, fail)
    assert isinstance(own, MemoryError)
    assert isinstance(lost, OtherProcessError)
    assert lost.message == "Process 1 of this training failed: no room"
    failed.set()
    (unexplained, _) = in_threads(lose, lambda processes: None)
    assert isinstance(unexplained, TrainingError)
    assert "Connection closed by peer" in unexplained.message


def test_a_process_that_is_ended_because_another_has_failed_says_so() -> None:
    told = threading.Event()

    def end(processes: Processes) -> None:
        told.wait(10)
        raise KeyboardInterrupt

    def fail(processes: Processes) -> None:
        threading.Timer(0.2, told.set).start()
        raise DataError("The file is empty.")

    ended, _ = in_threads(end, fail)
    assert isinstance(ended, OtherProcessError)
    assert ended.message == "Process 1 of this training failed: The file is empty."
    told.clear()
    threading.Timer(0.2, told.set).start()
    ended, _ = in_threads(end, end)
    assert isinstance(ended, KeyboardInterrupt)


def test_the_shares_of_a_batch_are_the_batch() -> None:
    shares = [Processes(number, 3).shard([1, 2, 3, 4, 5]) for number in range(3)]
    assert shares == [[1, 4], [2, 5], [3]]
    assert Processes(2, 3).shard([1, 2]) == []
    assert Processes().shard([1, 2]) == [1, 2]


def test_diagnostics_are_means_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(0, 2)
    monkeypatch.setattr(
        processes, "all_gather", lambda own: [own, ({"entropy": 4.0, "other": 1.0}, {"entropy": 1, "other": 2})]
    )
    diagnostics = StepDiagnostics(processes)
    diagnostics.add(3, entropy=2.0)
    diagnostics.is_counting = False
    diagnostics.add(5, entropy=100.0)
    assert diagnostics.take() == {"entropy": 2.5, "other": 0.5}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["evaluate", "index", "simulate", "serve-fl", "join-fl", "validate"])
def test_other_commands_run_in_one_process(
    name: str, launched: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "config.yaml"]) == EXIT_USAGE
    assert "This command runs in one process, but 2 were started." in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main([name, "config.yaml"]) == EXIT_USAGE
    assert capsys.readouterr() == ("", "")


def test_a_folder_of_qdrant_is_for_one_process(
    launched: None, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config()
    store = "rag_system.knowledge_store={type: qdrant, path: store}"
    assert main(["train", str(config), store]) == EXIT_USAGE
    assert "for one process, but 2 were started" in capsys.readouterr().err
    assert not (config.parent / "runs").exists()


def test_each_process_takes_a_gpu_of_its_own(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    with pytest.raises(ModelError, match=r"run\.device is cuda:0, but each of 2 processes needs a GPU of its own"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="no device 'cuda:1'"):
        choose_device("auto")
    with pytest.raises(ConfigError, match="gives all GPUs to one process, but 2 were started"):
        placement_options(CausalLMConfig(model="m", device_map="auto"), ModelLocation("m", "m"), torch.device("cpu"))


def launch(launcher: Sequence[str], *arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def train(launcher: Sequence[str], config: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """Run a training and return its summary, as printed, and its log."""
    process = launch(launcher, "-m", "fedrag_cli", "train", str(config), "--json", "run.device=cpu", *overrides)
    printed, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return json.loads(printed), log


def files_of(run: Path) -> set[str]:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    # Each process keeps the state of its random numbers; the likelihood cache is named by the model's hash.
    return {name for name in files if "rng_state" not in name}


def events_of(run: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in event.items() if name not in ("time", "seconds")} for event in events]


def assert_close(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_close(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_close(left, right, f"{where}/{number}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5), where
    else:
        assert one == other, where


def assert_same_training(one: dict[str, Any], two: dict[str, Any], processes: int = 2) -> None:
    """Compare the runs of two summaries: weights, metrics, events and files."""
    first, second = Path(one["run_dir"]), Path(two["run_dir"])
    assert (one["processes"], two["processes"]) == (1, processes)
    assert [path.name for path in second.parent.iterdir()] == [second.name]
    assert files_of(first) == files_of(second)
    weights = sorted(first.glob("checkpoints/*/finished/weights.safetensors"))
    assert weights
    for file in weights:
        left, right = load_file(file), load_file(second / file.relative_to(first))
        assert left.keys() == right.keys()
        assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5, file
    left_events, right_events = events_of(first), events_of(second)
    assert left_events[0].pop("processes") == 1
    assert right_events[0].pop("processes") == processes
    assert_close(left_events, right_events)
    for name in ("metrics", "loss", "steps", "differences", "truncated"):
        assert_close(one[name], two[name], name)


OBJECTIVES: dict[str, list[str]] = {
    # 28 instances in batches of 5, so that shares are uneven.
    "ralt": ["trainer.mode=generator", "trainer.generator={batch_size: 5, top_k: 2, optimizer: sgd, learning_rate: 0.1,"
             " gradient_accumulation_steps: 2, gradient_checkpointing: true}"],
    "raft": ["trainer.mode=generator", "trainer.generator={type: raft, top_k: 3, batch_size: 3, lora: null, "
             "optimizer: sgd, learning_rate: 0.01}"],
    "lsr": ["trainer.retriever={type: lsr, top_k: 4, batch_size: 4, epochs: 2, optimizer: sgd, learning_rate: 0.01}"],
    "lsr both": ["trainer.retriever={type: lsr, top_k: 4, batch_size: 4, train: both, refresh_every: 2, optimizer: sgd,"
                 " learning_rate: 0.01, validation: {every: 2}}"],
    # Nothing gets better, so that both end with the untuned weights.
    "hybrid": ["rag_system.lexical={}", "trainer.retriever={type: lsr, top_k: 4, batch_size: 3, train: both, "
               "refresh_every: 2, optimizer: sgd, learning_rate: 0.01, validation: {every: 2, metric: recall@5}}"],
    "contrastive": ["trainer.retriever={type: contrastive, batch_size: 3, gradient_accumulation_steps: 2, train: both,"
                    " optimizer: sgd, learning_rate: 0.01}"],
    # Batches of one instance leave a process without any.
    "alternating": ["trainer.mode=alternating", "trainer.cycles=2",
                    "trainer.retriever={type: lsr, top_k: 4, batch_size: 1, max_steps: 3, optimizer: sgd,"
                    " learning_rate: 0.01, validation: {metric: mrr}}",
                    "trainer.generator={batch_size: 1, top_k: 2, max_steps: 3, optimizer: sgd, learning_rate: 0.1,"
                    " validation: {metric: f1}}"],
}  # fmt: skip


@pytest.mark.fl
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_train_what_one_trains(write_config: Callable[..., Path], objective: str) -> None:
    one, _ = train([sys.executable], write_config("one"), *OBJECTIVES[objective])
    two, log = train(TWO, write_config("two"), *OBJECTIVES[objective])
    assert_same_training(one, two)
    assert log.count("Run directory: ") == log.count("After training, test split: ") == 1


@pytest.mark.fl
def test_an_interrupted_training_of_two_processes_goes_on_in_two(write_config: Callable[..., Path]) -> None:
    slow = ["trainer.retriever={type: lsr, top_k: 4, batch_size: 2, epochs: 20, optimizer: sgd, learning_rate: 0.01}"]
    one, _ = train([sys.executable], write_config("one"), *slow)
    config = write_config("two")
    process = launch(TWO, "-m", "fedrag_cli", "train", str(config), "run.device=cpu", *slow, start_new_session=True)
    log = config.parent / "runs"
    until = time.monotonic() + 120
    while not any("train_step" in file.read_text(encoding="utf-8") for file in log.rglob("metrics.jsonl")):
        assert time.monotonic() < until
        time.sleep(0.1)
    # As Ctrl-C on a terminal: the launcher and both processes get it, and the launcher hands it on besides.
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    (run,) = log.glob("*/*")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "interrupted", shown
    assert "Interrupted in 1-retriever after step" in shown
    assert shown.count(f"Go on with: torchrun --nproc_per_node 2 -m fedrag_cli resume {run}") == 1
    resumed = launch(TWO, "-m", "fedrag_cli", "resume", str(run), "--json")
    printed, shown = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, shown
    two = json.loads(printed)
    assert two["processes"] == 2
    assert_close(one["metrics"], two["metrics"])
    left, right = (
        load_file(Path(summary["run_dir"]) / "checkpoints/1-retriever/finished/weights.safetensors")
        for summary in (one, two)
    )
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5


BROKEN = """
import os, sys
from fedrag_cli.trainers.huggingface.generator import HuggingFaceTrainerForGenerator as Trainer

collate = Trainer._collate

def fail(self, instances):
    if os.environ["RANK"] == "1":
        raise MemoryError("no room for the batch")
    return collate(self, instances)

Trainer._collate = fail
from fedrag_cli.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fl
def test_a_process_that_fails_ends_the_run_of_all(write_config: Callable[..., Path], tmp_path: Path) -> None:
    script, config = tmp_path / "broken.py", write_config()
    script.write_text(BROKEN, encoding="utf-8")
    process = launch(TWO, str(script), "train", str(config), "trainer.mode=generator", "run.device=cpu")
    _, log = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "no room for the batch" in log
    (run,) = (config.parent / "runs").glob("*/*")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "failed"
    assert "Process 1 of this training failed: no room for the batch" in manifest["error"]
    assert not (run / "generator").exists()


SLOW = """
import sys, time
from fedrag_cli.commands.job import Job

def wait(job, *arguments):
    (job.run.path / "evaluating").touch()
    for _ in range(600):
        time.sleep(0.1)

Job.evaluate = wait
from fedrag_cli.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fl
@pytest.mark.parametrize("launcher", [[sys.executable], TWO], ids=["one", "two"])
def test_a_signal_before_the_first_step_is_written_down(
    write_config: Callable[..., Path], tmp_path: Path, launcher: list[str]
) -> None:
    script, config = tmp_path / "slow.py", write_config()
    script.write_text(SLOW, encoding="utf-8")
    process = launch(launcher, str(script), "train", str(config), "run.device=cpu")
    until = time.monotonic() + 120
    while not list((config.parent / "runs").glob("*/*/evaluating")):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    (run,) = (config.parent / "runs").glob("*/*")
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "interrupted", shown
    command = "fedrag" if launcher is not TWO else "torchrun --nproc_per_node 2 -m fedrag_cli"
    assert shown.count(f"Go on with: {command} resume {run}") == 1
    assert process.returncode == (130 if launcher is not TWO else 1)


def test_the_way_to_go_on_names_the_launcher(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("runs/my run")
    assert resume_command(run) == "torchrun --nproc_per_node 2 -m fedrag_cli resume 'runs/my run'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "for several machines" in resume_command(run)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    accelerate = "accelerate launch --multi_gpu --num_processes 2 -m fedrag_cli resume 'runs/my run'"
    assert resume_command(run) == accelerate
    monkeypatch.delenv("RANK")
    assert resume_command(run) == "fedrag resume 'runs/my run'"


WITHOUT_DEVICE = """
import os, sys
from fedrag_cli.errors import ModelError
from fedrag_cli.commands import train as training

choose = training.choose_device

def fail(device):
    if os.environ["RANK"] == "1":
        raise ModelError("This machine has no device 'cuda:1'.", "Set run.device to auto or cpu.")
    return choose(device)

training.choose_device = fail
from fedrag_cli.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fl
def test_a_process_that_fails_before_it_joins_says_why_and_ends_the_others(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    script, config = tmp_path / "device.py", write_config()
    script.write_text(WITHOUT_DEVICE, encoding="utf-8")
    arguments = (str(script), "train", str(config), "run.device=cpu")
    _, log = launch(TWO, *arguments).communicate(timeout=120)
    assert log.count("Error: Process 1: This machine has no device 'cuda:1'.") == 1
    # Without torchrun nobody ends the main process for it.
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    main_one, other = (
        launch(["env", *(f"{name}={value}" for name, value in (shared | {"RANK": rank}).items()), sys.executable],
               *arguments)
        for rank in ("0", "1")
    )  # fmt: skip
    _, of_main = main_one.communicate(timeout=120)
    assert main_one.returncode == EXIT_DATA
    assert "Process 1 of this training failed: This machine has no device 'cuda:1'." in of_main
    assert "Error: Process 1: This machine" in other.communicate(timeout=120)[1]
    assert not (config.parent / "runs").exists()


@pytest.mark.fl
def test_what_is_wrong_is_told_once_and_leaves_no_run(write_config: Callable[..., Path]) -> None:
    config = write_config()
    process = launch(TWO, "-m", "fedrag_cli", "train", str(config), "rag_system.retriever.model=./missing")
    _, log = process.communicate(timeout=300)
    assert process.returncode != 0
    assert log.count("There is no model at") == 1
    assert log.count("exitcode: 3") >= 1
    assert not (config.parent / "runs").exists()
