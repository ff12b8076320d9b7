"""Starting servers and clients as processes, and configs for them; used by the tests of the federation."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import data_rows, write_rows
from safetensors.torch import load_file

FEDRAG = [sys.executable, "-W", "ignore", "-m", "fedrag_cli"]
PATIENCE = 240.0


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Process:
    """A running command of the federation, with what it has printed so far."""

    process: subprocess.Popen[bytes]
    folder: Path
    name: str

    @property
    def log(self) -> str:
        """What was printed for people."""
        return (self.folder / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")

    def document(self) -> dict[str, Any]:
        """Return the JSON document that was printed."""
        value: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
        return value

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until a text was printed so often."""
        end = time.monotonic() + PATIENCE
        while self.log.count(text) < count:
            assert self.process.poll() is None, f"{self.name} ended before '{text}':\n{self.log}"
            assert time.monotonic() < end, f"{self.name} never printed '{text}':\n{self.log}"
            time.sleep(0.02)

    def finish(self, code: int = 0) -> dict[str, Any]:
        """Wait for the end, check the exit code, and return the JSON document."""
        try:
            found = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} hangs:\n{self.log}") from None
        assert found == code, f"{self.name} ended with {found}, not {code}:\n{self.log}"
        assert "Traceback" not in self.log, self.log
        return self.document()

    def kill(self) -> None:
        """Kill with -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def run_directory(self) -> Path:
        """Return the run directory, from the first line that was printed."""
        self.wait_for("Run directory: ")
        return Path(self.log.split("Run directory: ")[1].splitlines()[0])


class Federation:
    """A folder with configs for a server and its sites, and the processes that run on them."""

    def __init__(self, folder: Path, models: dict[str, Path], *, sites: int = 2, **sections: Any) -> None:
        """Write data and configs; keyword arguments are merged into the sections of the shared config."""
        self.folder, self.sites, self.port = folder, sites, free_port()
        self.processes: list[Process] = []
        base: dict[str, Any] = {
            "run": {"name": "server", "output_dir": str(folder / "runs")},
            "rag_system": {
                "retriever": {"model": str(models["retriever"])},
                "generator": {"model": str(models["generator"]), "max_new_tokens": 4},
                "top_k": 2,
            },
            "trainer": {
                "mode": "retriever",
                "retriever": {
                    "top_k": 4, "batch_size": 4, "learning_rate": 1e-3, "epochs": 1, "validation": {"every": "never"},
                },
                "generator": {"top_k": 2, "batch_size": 4, "learning_rate": 1e-2, "validation": {"every": "never"}},
            },
            "federated": {"rounds": 2, "min_clients": sites, "gather_timeout": 120.0, "rejoin_timeout": 60.0},
        }  # fmt: skip
        for name, section in sections.items():
            base[name] = _merged(base.get(name, {}), section)
        self.base = base
        self._write("server.yaml", base)
        rows = data_rows()
        write_rows(folder / "corpus.jsonl", rows["corpus"])
        for site in range(sites):
            for split in ("train", "validation"):
                write_rows(folder / f"site{site}" / f"{split}.jsonl", rows[split][site::sites])
            self.write_site(site)

    def write_site(self, site: int, **sections: Any) -> Path:
        """Write a site's config."""
        own: dict[str, Any] = {
            "extends": "server.yaml",
            "run": {"name": f"site{site}"},
            "dataset": {
                "corpus": {"path": "corpus.jsonl"},
                "train": {"path": f"site{site}/train.jsonl"},
                "validation": {"path": f"site{site}/validation.jsonl"},
            },
            "evaluation": {"resamples": 100, "metrics": ["mrr"]},
            "federated": {"name": f"site{site}", "connect_timeout": 60.0},
        }
        for name, section in sections.items():
            own[name] = _merged(own.get(name, {}), section)
        return self._write(f"site{site}.yaml", own)

    def serve(self, *overrides: str, host: str = "127.0.0.1", name: str = "server") -> Process:
        """Start the server."""
        arguments = ["serve-fl", "server.yaml", "--address", f"{host}:{self.port}", *overrides]
        return self.start(name, arguments)

    def join(self, site: int, *overrides: str, host: str = "127.0.0.1", name: str = "", port: int = 0) -> Process:
        """Start a client."""
        address = f"{host}:{port or self.port}"
        return self.start(name or f"site{site}", ["join-fl", f"site{site}.yaml", "--address", address, *overrides])

    def resume(self, run: Path, name: str) -> Process:
        """Resume a run."""
        return self.start(name, ["resume", str(run)])

    def start(self, name: str, arguments: list[str]) -> Process:
        """Start a command; its JSON and its messages go to files."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        with (self.folder / f"{name}.json").open("wb") as out, (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*FEDRAG, *arguments, "--json"],
                stdout=out,
                stderr=log,
                cwd=self.folder,
                env=environment,
                # Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
                preexec_fn=_take_interrupts,
            )
        started = Process(process, self.folder, name)
        self.processes.append(started)
        return started

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.process.send_signal(signal.SIGCONT)
                process.process.kill()
                process.process.wait(10)

    def _write(self, name: str, config: dict[str, Any]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path


def tuned_weights(run: Path, side: str = "retriever") -> dict[str, torch.Tensor]:
    """Return all tensors that a run has saved for a side."""
    files = sorted(run.glob(f"{side}/**/*.safetensors"))
    assert files
    return {f"{file.relative_to(run)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(run: Path, other: Path, side: str = "retriever") -> None:
    """Check that two runs have saved bit-identical tensors."""
    theirs = tuned_weights(other, side)
    for name, tensor in tuned_weights(run, side).items():
        assert torch.equal(theirs[name], tensor), name


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the events of a name in a run's log."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _merged(old: dict[str, Any], new: Any) -> Any:
    if not isinstance(new, dict):
        return new
    return {
        **old,
        **{key: _merged(old.get(key, {}), value) if isinstance(value, dict) else value for key, value in new.items()},
    }
