"""Measure what a round costs without any work to do, and write the figures to RESULTS.md.

    python scripts/bench/federation_overhead.py

A server and two client processes over loopback with TLS and node keys, against a stock SuperLink with two SuperNodes
(without TLS) on the same trivial work, and against ten simulated clients.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

ROUNDS, STOCK_ROUNDS = 20, 4
STOCK_PROJECT = """\
[project]
name = "trivial"
version = "1.0.0"
description = "trivial work"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "trivial.apps:server"
clientapp = "trivial.apps:client"

[tool.flwr.app.config]
out = ""
"""
STOCK_APPS = f"""\
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    arrays = ArrayRecord({{k: Array(a.numpy() + 1) for k, a in message.content["arrays"].items()}})
    return Message(RecordDict({{"arrays": arrays, "metrics": MetricRecord({{"num-examples": 1}})}}), reply_to=message)

@server.main()
def main(grid, context):
    marks = []
    def mark(number, arrays):
        marks.append(time.time())
    FedAvg(min_train_nodes=2, min_available_nodes=2, fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=ArrayRecord({{"w": Array(np.zeros(10, np.float32))}}), num_rounds={STOCK_ROUNDS},
        evaluate_fn=mark)
    open(context.run_config["out"], "w").write(json.dumps(marks))
"""


def main() -> None:
    """Measure the three, print and write."""
    rows = [
        ("fedrag, 2 client processes, TLS and node keys", seconds_of_fedrag(), "0.6"),
        ("stock SuperLink, 2 SuperNodes, no TLS", seconds_of_stock(), ""),
        ("fedrag, 10 simulated clients", seconds_of_simulation(), "0.05"),
    ]
    lines = ["| federation | median s a round | min - max | target |", "| --- | ---: | ---: | ---: |"]
    for name, seconds, target in rows:
        low, high = min(seconds), max(seconds)
        bound = f"<= {target}" if target else ""
        lines.append(f"| {name} | {statistics.median(seconds):.3f} | {low:.3f} - {high:.3f} | {bound} |")
    ratio = statistics.median(rows[1][1]) / statistics.median(rows[0][1])
    facts = (
        f"`python scripts/bench/federation_overhead.py`: seconds between two aggregations, {ROUNDS} rounds "
        f"({STOCK_ROUNDS} on the stock SuperLink). The stock SuperLink takes {ratio:.0f} times as long."
    )
    text = "\n".join([facts, "", *lines, "", machine()])
    print(text)
    write_section("Federation, overhead of a round", text)


def seconds_of_fedrag() -> list[float]:
    """Return the seconds of each round over processes."""
    from toy_federation import serving

    from fedrag_cli.federated.endpoint import ServerCertificate
    from fedrag_cli.federated.keys import (
        load_allowed_keys,
        write_authority,
        write_node_key,
        write_server_certificate,
    )

    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder)
        write_authority(keys)
        write_server_certificate(keys, ["localhost"])
        for name in ("a", "b"):
            write_node_key(keys, name)
        certificate = ServerCertificate(keys / "server.crt", keys / "server.key")
        with serving(certificate=certificate, allowed=load_allowed_keys(keys)) as server:
            command = [sys.executable, "-W", "ignore", __file__, "client", f"localhost:{server.address[1]}", folder]
            clients = [subprocess.Popen([*command, name]) for name in ("a", "b")]
            seconds = timed_rounds(server.grid, 2)
            for client in clients:
                client.wait(60)
    return seconds


def run_client(address: str, keys: Path, name: str) -> None:
    """Be one client process."""
    from toy_federation import ToyClient

    from fedrag_cli.federated.endpoint import ServerAddress
    from fedrag_cli.federated.fleet.client import FleetNode
    from fedrag_cli.federated.keys import load_private_key
    from fedrag_cli.runs.reporter import SilentReporter

    where = ServerAddress(address, tls=True, ca_certificate=(keys / "ca.crt").read_bytes())
    FleetNode(where, load_private_key(keys / f"{name}.key"), SilentReporter()).run(ToyClient(name, [1.0, 1.0, 1.0]))


def seconds_of_simulation() -> list[float]:
    """Return the seconds of each round with ten clients in this process."""
    from toy_federation import ToyClient

    from fedrag_cli.federated.grid import InProcessGrid

    clients = {f"c{number}": ToyClient(f"c{number}", [1.0, 1.0, 1.0]) for number in range(10)}
    return timed_rounds(InProcessGrid(clients), 10)  # type: ignore[arg-type]


def timed_rounds(grid: object, clients: int) -> list[float]:
    """Run rounds of FedAvg over a grid and return the seconds between two saved states."""
    import torch
    from toy_federation import common

    from fedrag_cli.config.schema import FederatedConfig
    from fedrag_cli.federated.checkpoint import RoundState
    from fedrag_cli.federated.config import FedAvgConfig
    from fedrag_cli.federated.rounds_loop import Federation
    from fedrag_cli.registry import build
    from fedrag_cli.runs.reporter import SilentReporter

    marks: dict[int, float] = {}
    settings = FederatedConfig(rounds=ROUNDS, min_clients=clients)
    federation = Federation(
        grid,  # type: ignore[arg-type]
        common(),
        settings,
        build("strategy", FedAvgConfig(), min_clients=clients, learning_rate=1.0),
        seed=0,
        reporter=SilentReporter(),
        save_round=lambda state: marks.setdefault(state.number, time.perf_counter()) and None,
    )
    federation.run(RoundState(0, {"w": torch.zeros(3)}))
    # The first round waits for the clients to start.
    return [marks[number] - marks[number - 1] for number in range(2, ROUNDS + 1)]


def seconds_of_stock() -> list[float]:
    """Return the seconds of each round on a stock SuperLink."""
    with tempfile.TemporaryDirectory() as folder:
        home, app, out = Path(folder) / "home", Path(folder) / "app", Path(folder) / "marks.json"
        (app / "trivial").mkdir(parents=True)
        home.mkdir()
        (app / "pyproject.toml").write_text(STOCK_PROJECT)
        (app / "trivial" / "__init__.py").write_text("")
        (app / "trivial" / "apps.py").write_text(STOCK_APPS)
        port = free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        environment = {
            **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        commands = [
            ["flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation"]
        ]
        for _ in range(2):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            commands.append(node)
        running = []
        try:
            for command in commands:
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                running.append(subprocess.Popen(command, env=environment, start_new_session=True, **quiet))
                wait_for_port(port)
            submit = ["flwr", "run", str(app), "local", "--run-config", f'out="{out}"']
            subprocess.run(submit, env=environment, check=True, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 600
            while not out.exists() or not out.read_text():
                if time.monotonic() > deadline:
                    raise SystemExit("the stock SuperLink did not finish")
                time.sleep(0.5)
            marks = json.loads(out.read_text())
        finally:
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
    return [after - before for before, after in itertools.pairwise(marks[1:])]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Wait until something listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            threading.Event().wait(0.1)
    raise SystemExit("the SuperLink did not start")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "client":
        run_client(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        main()
