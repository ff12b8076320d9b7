"""A strategy of a third party, from its entry point on: validated, simulated, resumed, and served to clients."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plugin_strategy
import pytest
import torch
from federation import Federation, assert_same_weights, tuned_weights
from plugins import install, installed
from safetensors.torch import load_file

from fedrag_cli.cli.main import main

ENTRY_POINT = "plugin_strategy:register"


def aggregated(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "round-0001" / "weights.safetensors")


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[None]:
    with installed(tmp_path / "packages", "fedrag-part", entry_point=ENTRY_POINT):
        yield


def test_it_answers_for_itself(
    plugin: None, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, part = str(write_config(federated={})), "federated.strategy={type: Part}"
    assert main(["validate", config, part]) == 0
    # It says that it takes means, so privacy is allowed; that it gives them it does not say.
    assert main(["validate", config, part, "federated.privacy={clipping_norm: 1, noise_multiplier: 1}"]) == 0
    assert main(["validate", config, part, "federated.lora_aggregation=svd"]) == 2
    assert "svd gives the mean itself, of which Part takes no step" in capsys.readouterr().err
    assert main(["validate", config, "federated.strategy={type: Part, least: 3}"]) == 2
    assert "federated.min_clients: must be at least 3 for Part" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_simulated_and_resumed(plugin: None, simulate: Callable[..., Any]) -> None:
    whole, _ = simulate("federated.strategy={type: Part, part: 0.25}")
    mean = aggregated(simulate("federated.strategy={type: FedAvg}", folder="b")[0])
    start = aggregated(simulate("federated.strategy={type: Part, part: 1e-30}", folder="c")[0])
    moved = max(float((mean[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-4
    for name, tensor in aggregated(whole).items():
        expected = start[name] + 0.25 * (mean[name] - start[name])
        assert float((tensor - expected).abs().max()) <= 1e-3 * moved, name
    resumed = Path(shutil.copytree(whole, whole.parent / "again"))
    manifest = json.loads((resumed / "manifest.json").read_text())
    (resumed / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    for name in ("checkpoints/round-0002", "retriever"):
        shutil.rmtree(resumed / name)
    assert main(["resume", str(resumed), "--quiet"]) == 0
    # With the way of the first round, which came from the checkpoint.
    assert_same_weights(resumed, whole)


@pytest.mark.fl
def test_it_is_served(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    packages = install(tmp_path / "packages", "fedrag-part", entry_point=ENTRY_POINT)
    for folder in (packages, Path(plugin_strategy.__file__).parent):
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    federation = Federation(tmp_path / "federation", models, federated={"strategy": {"type": "Part"}})
    try:
        server = federation.serve()
        server.wait_for("Listening on")
        clients = [federation.join(site) for site in range(2)]
        summary = server.finish()
        final = [tuned_weights(Path(client.finish()["run_dir"])) for client in clients]
    finally:
        federation.stop()
    assert [row["clients"] for row in summary["rounds"]] == [["site0", "site1"]] * 2
    for name, tensor in tuned_weights(Path(summary["run_dir"])).items():
        assert "/query_" not in name or all(torch.equal(theirs[name], tensor) for theirs in final), name
