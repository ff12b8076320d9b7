"""A strategy of a third party, from its entry point on: validated, simulated, resumed, and served to clients."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SIMULATED_TRAINER
from federation import Federation, assert_same_weights, tuned_weights
from safetensors.torch import load_file
from test_registry import fedrag, install

PLUGIN = '''\
from typing import ClassVar, Literal

from fedrag_cli.config.fields import PositiveFloat, PositiveInt, config_class
from fedrag_cli.federated.config import StrategyConfig


@config_class
class PartConfig(StrategyConfig):
    """A part of the way to the mean of the updates."""

    takes_mean: ClassVar[bool] = True

    type: Literal["Part"] = "Part"
    """Names this strategy."""
    part: PositiveFloat = 0.5
    """How much of the way."""
    least: PositiveInt = 1
    """Fewest clients."""

    def check(self, config, path):
        if config.federated.min_clients < self.least:
            yield ("federated", "min_clients"), f"must be at least {self.least} for Part"


def build(config, *, min_clients, learning_rate):
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    class Part(FedAvg):
        """Keeps the way that it has gone, as momentum does."""

        def configure_train(self, server_round, arrays, config, grid):
            self.before = arrays
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            assert len(replies) == 1, "of a strategy that takes means the updates are one"
            arrays, metrics = super().aggregate_train(server_round, replies)
            before = {name: array.numpy() for name, array in self.before.items()}
            del self.before
            gone, self.gone = getattr(self, "gone", {}), {}
            for name, old in before.items():
                step = config.part * (arrays[name].numpy() - old) + 0.1 * gone.get(name, 0.0)
                self.gone[name] = np.asarray(step, np.float32)
            return ArrayRecord({name: Array(old + self.gone[name]) for name, old in before.items()}), metrics

    nodes = {"min_train_nodes": min_clients, "min_evaluate_nodes": min_clients, "min_available_nodes": min_clients}
    return Part(fraction_train=config.fraction, **nodes)


def register(registry):
    registry.register("strategy", "Part", PartConfig, "fedrag_part:build", "a part of the way to the mean")
'''
PART = "federated.strategy={type: Part, part: 0.25}"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    return install(tmp_path / "packages", "fedrag-part", PLUGIN)


def tuned(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "checkpoints").glob("round-0001/weights.safetensors")))


@pytest.mark.slow
def test_it_is_validated_simulated_and_resumed(packages: Path, write_config: Callable[..., Path]) -> None:
    config = str(write_config("a", trainer=SIMULATED_TRAINER, federated={"rounds": 2}))
    done = fedrag(packages, "validate", config, PART)
    assert done.returncode == 0, done.stderr
    done = fedrag(packages, "validate", config, "federated.strategy={type: Part, least: 3}")
    assert done.returncode == 2
    assert "federated.min_clients: must be at least 3 for Part" in done.stderr
    # It says that it takes means, so privacy is allowed; that it gives them it does not say.
    private = fedrag(packages, "validate", config, PART, "federated.privacy={clipping_norm: 1, noise_multiplier: 1}")
    assert private.returncode == 0, private.stderr
    svd = fedrag(packages, "validate", config, PART, "federated.lora_aggregation=svd")
    assert "svd gives the mean itself, of which Part takes no step" in svd.stderr

    def simulated(*overrides: str) -> Path:
        done = fedrag(packages, "simulate", config, *overrides, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        return Path(json.loads(done.stdout)["run_dir"])

    whole = simulated(PART)
    mean, part = tuned(simulated("federated.strategy={type: FedAvg}")), tuned(whole)
    start = tuned(simulated("federated.strategy={type: Part, part: 1e-30}"))
    moved = max(float((mean[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-4
    for name, tensor in part.items():
        expected = start[name] + 0.25 * (mean[name] - start[name])
        assert float((tensor - expected).abs().max()) <= 1e-3 * moved, name
    resumed = Path(shutil.copytree(whole, whole.parent / "again"))
    manifest = json.loads((resumed / "manifest.json").read_text())
    (resumed / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    for name in ("checkpoints/round-0002", "retriever"):
        shutil.rmtree(resumed / name)
    done = fedrag(packages, "resume", str(resumed), "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    # With the way of the first round, which came from the checkpoint.
    assert_same_weights(resumed, whole)


@pytest.fixture
def federation(
    packages: Path, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Federation]:
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
    made = Federation(tmp_path / "federation", models, federated={"strategy": {"type": "Part"}})
    yield made
    made.stop()


@pytest.mark.fl
def test_it_is_served(federation: Federation) -> None:
    server = federation.serve()
    server.wait_for("Listening on")
    clients = [federation.join(site) for site in range(2)]
    summary = server.finish()
    assert [row["clients"] for row in summary["rounds"]] == [["site0", "site1"]] * 2
    for client in clients:
        assert_same_final(Path(summary["run_dir"]), Path(client.finish()["run_dir"]))


def assert_same_final(server: Path, client: Path) -> None:
    theirs = tuned_weights(client)
    for name, tensor in tuned_weights(server).items():
        if "/query_" in name:
            assert torch.equal(theirs[name], tensor), name
