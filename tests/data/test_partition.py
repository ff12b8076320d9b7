"""Simulated sites: whose data they see, what each trains, and what the server measures; all against training alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANIMALS, data_rows, write_rows
from federation import Federation, events, tuned_weights
from safetensors.torch import load_file

from fedrag_cli.cli.main import main
from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.commands.simulate import site_name
from fedrag_cli.config import load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.federated.weights import load_weights
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.prompts import PromptEncoder
from fedrag_cli.trainer_managers.build import build_manager

NEVER = {"every": "never"}
TRAINER = {
    "retriever": {"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, "epochs": 1, "validation": NEVER},
    "generator": {"top_k": 2, "batch_size": 4, "learning_rate": 1e-2, "epochs": 1, "validation": NEVER},
}
SITES = ("0", "1")


def site_of(text: str) -> str:
    """Return whose a question or passage is: every second animal belongs to the same site."""
    (number,) = (number for number, animal in enumerate(ANIMALS) if f" {animal} " in f" {text} ")
    return str(number % 2)


def owned_rows(site: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the data with an owner for each passage; that of one site only, where one is named."""
    rows = data_rows()
    for passage in rows["corpus"]:
        passage["site"] = int(site_of(passage["text"]))
    return {
        name: [row for row in of_split if site is None or str(row["site"]) == site] for name, of_split in rows.items()
    }


@pytest.fixture
def run_command(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command on a config, and returns the run directory and the summary."""

    def run(
        command: str,
        mode: str,
        *arguments: str,
        folder: str,
        rows: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        **sections: Any,
    ) -> tuple[Path, dict[str, Any]]:
        settings = {"evaluation": {"resamples": 50, "metrics": ["mrr"]}, **sections}
        config = write_config(folder, trainer={**TRAINER, "mode": mode, **(trainer or {})}, **settings)
        for name, of_split in (rows or {}).items():
            write_rows(config.parent / f"{name}.jsonl", of_split)
        capsys.readouterr()
        assert main([command, str(config), *arguments, "--json", "--quiet"]) == 0
        summary = json.loads(capsys.readouterr().out)
        return Path(summary["run_dir"]), summary

    return run


def finished_phase(run: Path, stage: str, mode: str) -> dict[str, torch.Tensor]:
    """Return the weights that a training ended with."""
    return load_file(run / "checkpoints" / stage / f"1-{mode}" / "finished" / "weights.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("mode", ["retriever", "generator"])
@pytest.mark.parametrize("owned", [True, False])
def test_a_site_sees_its_own_passages_only(
    run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mode: str, owned: bool
) -> None:
    """What a site has retrieved is what the prompts of its questions hold."""
    seen: set[tuple[str, str]] = set()
    encode = PromptEncoder.encode_pair

    def noted(self: PromptEncoder, query: str, passages: list[KnowledgeNode], *args: Any, **options: Any) -> Any:
        seen.update((site_of(query.rstrip("?")), site_of(passage.text)) for passage in passages)
        return encode(self, query, passages, *args, **options)

    monkeypatch.setattr(PromptEncoder, "encode_pair", noted)
    rows = owned_rows() if owned else None
    # The server's own questions are asked to the retriever only; they go over the whole corpus.
    _, summary = run_command("simulate", mode, folder="a", rows=rows, federated={"rounds": 1})
    assert summary["rounds"][0]["clients"] == ["site-0", "site-1"]
    if owned:
        assert seen == {(site, site) for site in SITES}
    else:
        assert {("0", "1"), ("1", "0")} <= seen


@pytest.mark.parametrize("mode", ["retriever", "generator"])
def test_each_site_alone_is_a_training_on_its_own_data(run_command: Callable[..., Any], mode: str) -> None:
    # Adam would make steps of rounding errors where a gradient is 0.
    settings = {mode: {**TRAINER[mode], "optimizer": "sgd", "learning_rate": 0.05}}
    run, summary = run_command(
        "simulate", mode, "--compare", folder="a", rows=owned_rows(), trainer=settings, federated={"rounds": 2}
    )
    settings[mode]["epochs"] = 2
    trained = {}
    for site in SITES:
        alone, alone_summary = run_command(
            "train", mode, folder=f"alone-{site}", rows=owned_rows(site), trainer=settings
        )
        trained[site] = finished_phase(alone, ".", mode)
        found = finished_phase(run, f"alone-site-{site}", mode)
        assert largest_difference(found, trained[site]) <= 1e-6
        directory = run / "checkpoints" / f"alone-site-{site}" / f"1-{mode}" / "finished"
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        assert result["steps"] == alone_summary["steps"]
        assert result["loss"] == pytest.approx(alone_summary["loss"], abs=1e-5)
        assert summary["data"][f"site-{site}"] == alone_summary["data"]["train"] == len(owned_rows(site)["train"])
    trained["pooled"] = finished_phase(run, "pooled", mode)
    for one, other in (("0", "1"), ("0", "pooled"), ("1", "pooled")):
        assert largest_difference(trained[one], trained[other]) > 1e-4


def test_the_server_measures_every_so_many_rounds_and_the_first_and_last_model(run_command: Callable[..., Any]) -> None:
    short = {"retriever": {**TRAINER["retriever"], "max_steps": 1}}
    federated = {"rounds": 5, "evaluate_every": 2}
    run, summary = run_command("simulate", "retriever", folder="a", trainer=short, federated=federated)
    measured = [number for number, found in summary["evaluations"].items() if "server" in found]
    assert sorted(measured) == ["0", "2", "4", "5"]
    by_server = [event["round"] for event in events(run, "federated_evaluation") if event["by"] == "server"]
    assert by_server == [0, 2, 4, 5]
    stages = sorted(file.stem for file in (run / "evaluation").glob("*.json"))
    assert stages == ["after", "before", "round-2", "round-4"]
    # Clients measure what they receive in every round.
    assert all("clients" in summary["evaluations"][str(number)] for number in range(6))


OBJECTIVES = ["pdist", "emdr2", "loop"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_round_of_other_objectives_is_the_mean_of_trainings_on_each_sites_data(
    run_command: Callable[..., Any], objective: str, tmp_path: Path
) -> None:
    plain = {"optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    settings = {"retriever": {**TRAINER["retriever"], **plain, "type": objective, "top_k": 3}}
    # Unequal sites, so that the mean has weights.
    rows = owned_rows()
    rows["train"] = [row for number, row in enumerate(rows["train"]) if row["site"] == 0 or number % 3]
    run, summary = run_command(
        "simulate", "retriever", folder="a", rows=rows, trainer=settings, federated={"rounds": 1}
    )
    counts, weights, losses = [], [], []
    for site in SITES:
        own = {name: [row for row in of_split if str(row["site"]) == site] for name, of_split in rows.items()}
        alone, alone_summary = run_command("train", "retriever", folder=f"alone-{site}", rows=own, trainer=settings)
        counts.append(len(own["train"]))
        weights.append(finished_phase(alone, ".", "retriever"))
        losses.append(alone_summary["loss"])
    assert counts[0] != counts[1]
    updates = {event["client"]: event for event in events(run, "client_update")}
    assert [updates[f"site-{site}"]["examples"] for site in SITES] == counts
    assert [updates[f"site-{site}"]["metrics"]["loss"] for site in SITES] == pytest.approx(losses, abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    mean = {name: (counts[0] * weights[0][name] + counts[1] * weights[1][name]) / sum(counts) for name in weights[0]}
    found = load_weights(run / "checkpoints" / "round-0001" / "weights.safetensors")
    assert largest_difference(found, mean) <= 1e-6
    assert largest_difference(found, weights[0]) > 1e-5
    assert summary["loss"] == pytest.approx((counts[0] * losses[0] + counts[1] * losses[1]) / sum(counts), abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_objectives_alternate_with_raft(write_config: Callable[..., Path], objective: str) -> None:
    """The same as each side by itself, the generator after the retriever and on what that one finds."""
    trainer = {
        "mode": "alternating",
        "retriever": {**TRAINER["retriever"], "type": objective, "top_k": 3, "learning_rate": 1e-2},
        "generator": {**TRAINER["generator"], "type": "raft", "top_k": 3, "gold_share": 0.5},
    }

    def manager(folder: str) -> Any:
        config = load_config(write_config(folder, trainer=trainer))
        data = load_run_data(config)
        rag_system = build_rag_system(config, nodes=data.nodes)
        return build_manager(config, rag_system, train=data.train, validation=data.validation)

    alternating, single = manager("alternating"), manager("single")
    start = {side: single.trainers[side].trained_weights() for side in ("retriever", "generator")}
    result = alternating.train()
    assert list(result.metrics) == ["1-retriever", "2-generator"]
    # The generator by itself, before the retriever has moved, learns from other passages.
    untuned = manager("untuned")
    untuned.mode = "generator"
    untuned.train()
    for side in ("retriever", "generator"):
        single.mode = side
        single.train()
        found = alternating.trainers[side].trained_weights()
        assert largest_difference(found, single.trainers[side].trained_weights()) <= 1e-6
        assert largest_difference(found, start[side]) > 1e-4
    generator = alternating.trainers["generator"].trained_weights()
    assert largest_difference(generator, untuned.trainers["generator"].trained_weights()) > 1e-5


@pytest.mark.parametrize("lora", [{"r": 4}, None])
def test_one_client_and_one_round_are_training_for_the_generator(run_command: Callable[..., Any], lora: Any) -> None:
    settings = {"generator": {**TRAINER["generator"], "lora": lora, "epochs": 2}}
    one = {"rounds": 1, "min_clients": 1, "sites": {"by": "random"}}
    run, summary = run_command("simulate", "generator", "--clients", "1", folder="a", trainer=settings, federated=one)
    alone, alone_summary = run_command("train", "generator", folder="b", trainer=settings)
    assert summary["rounds"][0]["clients"] == ["client-1"]
    assert summary["loss"] == pytest.approx(alone_summary["loss"], abs=1e-6)
    found, expected = tuned_weights(run, "generator"), tuned_weights(alone, "generator")
    assert largest_difference(found, expected) <= 1e-6
    start = load_weights(run / "checkpoints" / "round-0000" / "weights.safetensors")
    after = load_weights(run / "checkpoints" / "round-0001" / "weights.safetensors")
    assert largest_difference(after, finished_phase(alone, ".", "generator")) <= 1e-6
    assert largest_difference(after, start) > 1e-3


@pytest.mark.fl
def test_one_client_process_and_one_round_are_training_for_the_generator(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    sections = {"trainer": {"mode": "generator"}, "federated": {"rounds": 1}}
    federation = Federation(tmp_path, models, sites=1, **sections)
    metrics = "evaluation.metrics=[f1]"
    try:
        server, client = federation.serve(), federation.join(0, metrics)
        served = Path(server.finish()["run_dir"])
        joined = Path(client.finish()["run_dir"])
        alone = Path(federation.start("train", ["train", "site0.yaml", metrics]).finish()["run_dir"])
    finally:
        federation.stop()
    expected = tuned_weights(alone, "generator")
    for run in (served, joined):
        assert largest_difference(tuned_weights(run, "generator"), expected) <= 1e-6


@pytest.mark.parametrize(
    ("owner", "name"),
    [("0", "site-0"), ("Zürich Nord", "site-Zürich Nord"), ("../../x", "site-..%2F..%2Fx"), ("a:b\n", "site-a%3Ab%0A")],
)
def test_owners_of_data_make_no_paths_of_their_own(owner: str, name: str) -> None:
    assert site_name("site", owner) == name
