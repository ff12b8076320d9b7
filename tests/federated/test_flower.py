"""Stock Flower: the exported app on a real SuperLink and SuperNodes, and the classic API's server and clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from federation import Federation, free_port
from safetensors.torch import load_file

from fedrag_cli.cli.main import main

pytestmark = pytest.mark.fl
CLASSIC = """
import sys, warnings
warnings.simplefilter("ignore")
import logging
import fedrag_cli.federated
import flwr as fl
from fedrag_cli import build_rag_system, load_config
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR
from fedrag_cli.trainer_managers.huggingface import HuggingFaceRAGTrainerManager

role, config, address = sys.argv[1:]
rag_system = build_rag_system(load_config(config))
trainer = HuggingFaceTrainerForLSR(rag_system)
manager = HuggingFaceRAGTrainerManager(mode="retriever", retriever_trainer=trainer)
fl_task = manager.get_federated_task()
model = rag_system.retriever.query_encoder
before = {name: parameter.clone() for name, parameter in model.named_parameters()}
if role == "server":
    server = fl_task.server(model)
    history = fl.server.start_server(server_address=address, server=server, config=fl.server.ServerConfig(num_rounds=2))
    moved = max((parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters())
    losses = [value for _, value in history.metrics_distributed_fit["loss"]]
    print("MOVED", moved > 1e-5, "LOSSES", len(set(losses)) == 2 and 0.0 not in losses)
else:
    client = fl_task.client(model, trainer.train_examples, trainer.validation_examples)
    fl.client.start_client(server_address=address, client=client, insecure=True)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "flwr-home"
    home.mkdir()
    folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }


def test_the_classic_api_trains_both_clients_and_the_servers_model(
    tmp_path: Path, models: dict[str, Path], environment: dict[str, str]
) -> None:
    federation = Federation(tmp_path / "classic", models)
    address = f"127.0.0.1:{free_port()}"

    def start(role: str, site: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLASSIC, role, f"site{site}.yaml", address],
            cwd=federation.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    processes = [start("server", 0)]
    try:
        # A stock client that finds nobody there waits longer and longer before it tries again, up to minutes.
        wait_for_port(int(address.rpartition(":")[2]))
        processes += [start("client", 0), start("client", 1)]
        output, _ = processes[0].communicate(timeout=240)
        assert "MOVED True LOSSES True" in output, output
        for client in processes[1:]:
            client.wait(60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nobody listens on {port}")


def test_the_exported_app_runs_on_a_stock_superlink(
    tmp_path: Path, models: dict[str, Path], environment: dict[str, str]
) -> None:
    federation = Federation(tmp_path / "sites", models, federated={"rounds": 1})
    app = tmp_path / "app"
    assert main(["export-flower-app", str(app), str(federation.folder / "server.yaml"), "--quiet"]) == 0
    assert main(["export-flower-app", str(app), str(federation.folder / "server.yaml"), "--quiet"]) == 2
    port, output = free_port(), tmp_path / "tuned-model"
    log = (tmp_path / "flower.log").open("w", encoding="utf-8")
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        running.append(
            subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        )

    try:
        here = "--disable-runtime-dependency-installation"
        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), here)
        wait_for_port(port)
        for site in range(2):
            node = f'config="{federation.folder / f"site{site}.yaml"}"'
            runtime = str(free_port())
            start(
                "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", runtime,
                "--node-config", node,
            )  # fmt: skip
        connection = (
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        (Path(environment["FLWR_HOME"]) / "config.toml").write_text(connection, encoding="utf-8")
        submitted = subprocess.run(
            ["flwr", "run", str(app), "local", "--run-config", f'output="{output}"'],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        deadline = time.monotonic() + 300
        while not list(output.glob("**/model.safetensors")):
            assert time.monotonic() < deadline, (tmp_path / "flower.log").read_text()[-6000:]
            time.sleep(0.5)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        log.close()
    # Both nodes trained and evaluated; the query encoder moved and the passage encoder did not.
    assert (tmp_path / "flower.log").read_text(encoding="utf-8").count("Sent successfully") >= 4
    encoders = {file.parent.name: load_file(file) for file in output.glob("**/model.safetensors")}
    (base,) = (load_file(file) for file in models["retriever"].glob("**/model.safetensors"))
    assert len(encoders) == 2
    moved = {name: any(not torch.equal(tensors[key], base[key]) for key in base) for name, tensors in encoders.items()}
    assert {name.startswith("query"): value for name, value in moved.items()} == {True: True, False: False}
