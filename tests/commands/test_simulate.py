"""`fedrag simulate` through the command line: deterministic, split as asked, resumable, and with honest reports."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIMULATED_TRAINER, data_rows, write_rows
from federation import assert_same_weights, events, tuned_weights
from toy_federation import spent_epsilon

from fedrag_cli.cli.main import main
from fedrag_cli.commands.simulate import _task_of
from fedrag_cli.federated.task import FLTask


def test_owners_are_the_clients_and_the_same_seed_gives_the_same_weights(simulate: Callable[..., Any]) -> None:
    run, summary = simulate()
    assert [row["clients"] for row in summary["rounds"]] == [["site-0", "site-1"]] * 2
    assert summary["rounds"][0]["examples"] == 14
    assert {item["metric"] for item in summary["differences"]} >= {"mrr"}
    assert_same_weights(simulate(folder="b")[0], run)
    other = simulate("run.seed=7", folder="c")[0]
    changed = tuned_weights(other)
    assert any(not torch.equal(changed[name], tensor) for name, tensor in tuned_weights(run).items())
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "rounds: 2" in card
    assert "![federation](plots/federation.png)" in card


def test_random_and_skewed_splits(simulate: Callable[..., Any]) -> None:
    _, summary = simulate("--clients", "3", "federated.sites.by=random")
    assert summary["rounds"][0]["clients"] == ["client-1", "client-2", "client-3"]
    assert sorted(summary["data"][f"client-{n}"] for n in (1, 2, 3)) == [4, 5, 5]
    _, skewed = simulate("--clients", "2", "federated.sites={by: dirichlet, alpha: 0.2}", folder="b")
    assert sum(skewed["data"][f"client-{n}"] for n in (1, 2)) == 14
    _, wrong = simulate("--clients", "3", folder="c", code=2)
    assert "names 2 owners (0, 1), not 3" in wrong["error"]["message"]
    _, missing = simulate("federated.sites.by=random", folder="d", code=2)
    assert missing["error"]["hint"] == "Say --clients N."
    _, quorum = simulate("--clients", "1", "federated.sites.by=random", folder="e", code=2)
    assert "fewer than federated.min_clients" in quorum["error"]["message"]


@pytest.mark.slow
def test_a_simulation_goes_on_after_its_newest_round(simulate: Callable[..., Any], capsys: Any) -> None:
    whole, _ = simulate()
    run, _ = simulate(folder="b")
    # As if it had begun long ago, and had been killed in the second round.
    log = run / "metrics.jsonl"
    started, *rest = log.read_text().splitlines(keepends=True)
    assert json.loads(started)["event"] == "started"
    hours_ago = (datetime.now(UTC) - timedelta(hours=2)).isoformat(timespec="milliseconds")
    log.write_text("".join([json.dumps({**json.loads(started), "time": hours_ago}) + "\n", *rest]))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (run / "summary.json").unlink()
    (run / "evaluation" / "after.json").unlink()
    import shutil

    shutil.rmtree(run / "checkpoints" / "round-0002")
    shutil.rmtree(run / "retriever")
    assert main(["resume", str(run), "--json", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["round"] for row in summary["rounds"]] == [1, 2]
    assert 7000 < summary["seconds"] < 8000
    assert_same_weights(run, whole)


@pytest.mark.parametrize(
    ("command", "number"), [("simulate", signal.SIGTERM), ("serve-fl", signal.SIGHUP), ("join-fl", signal.SIGHUP)]
)
def test_a_federation_that_is_interrupted_while_loading_leaves_nothing(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    number: signal.Signals,
) -> None:
    config = write_config(trainer=SIMULATED_TRAINER, federated={"rounds": 1}, evaluation={"resamples": 100})

    def terminated(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    for module in ("serve", "run_data"):
        monkeypatch.setattr(f"fedrag_cli.commands.{module}.build_rag_system", terminated)
    address = [] if command == "simulate" else ["--address", "127.0.0.1:0"]
    assert main([command, str(config), *address]) == 130
    shown = capsys.readouterr().err
    run = shown.partition("Run directory: ")[2].splitlines()[0]
    assert f"Interrupted while data and models were loaded. Nothing was computed yet; '{run}' was removed." in shown
    assert "What to do: Give the command again." in shown
    assert not (config.parent / "runs").exists()


@pytest.mark.slow
def test_a_resume_that_was_killed_and_is_interrupted_while_loading_is_told_as_interrupted(
    simulate: Callable[..., Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = simulate()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))

    def terminated(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("fedrag_cli.commands.run_data.build_rag_system", terminated)
    assert main(["resume", str(run)]) == 130
    assert "Interrupted before the run went on; it is as it was." in capsys.readouterr().err
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_simulation_whose_data_or_model_has_changed_is_not_resumed(
    simulate: Callable[..., Any], models: dict[str, Path], capsys: Any
) -> None:
    run, _ = simulate()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(models["retriever"]), str(models["other_retriever"])))
    assert main(["resume", str(run)]) == 1
    assert "The base models of this run have changed since it started: retriever." in capsys.readouterr().err
    (run / "config.yaml").write_text(config)
    data = next(folder for folder in run.parents if (folder / "train.jsonl").exists()) / "train.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[1:]) + "\n")
    assert main(["resume", str(run)]) == 1
    assert "The data of this run has changed since it started: train." in capsys.readouterr().err


def test_a_simulation_waits_for_no_more_clients_than_it_has(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # If it waited, it would do so for the ten minutes of gather_timeout.
    config = write_config(trainer=SIMULATED_TRAINER, federated={"rounds": 1, "wait_for_clients": 9})
    assert main(["simulate", str(config)]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "federated.wait_for_clients is 9, but this simulation has 2 clients" in printed
    assert "Going on with" not in printed


def test_passages_are_encoded_anew_only_where_their_encoder_has_changed(
    simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedrag_cli.federated.client import ClientHandler
    from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever

    encode, answer = SentenceTransformerRetriever.encode_passages, ClientHandler.__call__
    corpora: list[int] = []
    by_message: list[tuple[str, int]] = []

    def encoding(self: Any, texts: Any, progress: Any = None) -> Any:
        corpora.append(len(texts))
        return encode(self, texts, progress)

    def answering(self: Any, message: Any) -> Any:
        before = len(corpora)
        reply = answer(self, message)
        by_message.append((message.metadata.message_type, len(corpora) - before))
        return reply

    monkeypatch.setattr(SentenceTransformerRetriever, "encode_passages", encoding)
    monkeypatch.setattr(ClientHandler, "__call__", answering)
    simulate("trainer.retriever.train=both", "federated.evaluate_every=2")
    work = [item for item in by_message if item[0] != "query"]
    # Both clients search the same passages; of the weights that there are, only the global ones are ever searched with.
    assert work == [("train", 0), ("train", 0), ("train", 1), ("train", 0), ("evaluate", 0), ("evaluate", 0)]
    assert len(set(corpora)) == 1
    assert len(corpora) == 3  # the base model's, and those after each of two rounds


def test_the_generator_and_fedprox(simulate: Callable[..., Any]) -> None:
    run, summary = simulate(
        "trainer.mode=generator", "federated.strategy={type: FedProx, proximal_mu: 0.1}", "evaluation.limit=2"
    )
    assert (run / "generator" / "adapter_config.json").exists()
    assert summary["rounds"][1]["loss"] is not None
    updates = events(run, "client_update")
    assert {event["client"] for event in updates} == {"site-0", "site-1"}
    assert all(event["norm"] > 0 for event in updates)


def test_float16_halves_what_a_simulation_would_send(simulate: Callable[..., Any]) -> None:
    plain = events(simulate("federated.rounds=1")[0], "client_update")
    run, _ = simulate("federated.rounds=1", "federated.transport_dtype=float16", folder="b")
    half = events(run, "client_update")
    heads = 128 * len({name for name in tuned_weights(run) if name.startswith("retriever/query")})
    for before, after in zip(plain, half, strict=True):
        for key in ("bytes_sent", "bytes_received"):
            assert (before[key] - heads) == 2 * (after[key] - heads) > 0
    # The saved model is the float32 aggregate, not what travels.
    saved = tuned_weights(run).values()
    assert any(not torch.equal(tensor, tensor.half().float()) for tensor in saved)


def test_both_encoders_move_and_every_store_follows(simulate: Callable[..., Any]) -> None:
    _, summary = simulate("trainer.retriever.train=both")
    assert len(summary["rounds"]) == 2


def test_a_federation_of_failing_clients_ends_with_5(simulate: Callable[..., Any]) -> None:
    _, document = simulate("trainer.retriever.learning_rate=1e30", "trainer.retriever.max_grad_norm=0", code=5)
    assert "Round 1 has 0 usable updates" in document["error"]["message"]


def test_alternating_is_refused(simulate: Callable[..., Any]) -> None:
    _, document = simulate("trainer.mode=alternating", code=2)
    assert "A federation tunes one side" in document["error"]["message"]


@pytest.mark.parametrize("mode", ["retriever", "generator"])
def test_the_federation_beside_pooled_and_single_sites(simulate: Callable[..., Any], mode: str) -> None:
    evaluation = {"resamples": 100, "metrics": ["mrr", "negative_log_likelihood"]}
    run, summary = simulate("--compare", f"trainer.mode={mode}", evaluation=evaluation)
    rows = {row["name"]: row for row in summary["comparison"]["rows"]}
    alone = ["site-0 alone", "site-1 alone"]
    assert list(rows) == ["untuned", "federated", "pooled", *alone, "each site alone, mean"]
    assert (run / "plots" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    metric = "mrr" if mode == "retriever" else "negative_log_likelihood"
    means = {name: row["metrics"][metric]["mean"] for name, row in rows.items()}
    before = next(item for item in summary["differences"] if item["metric"] == metric)
    assert (means["untuned"], means["federated"]) == pytest.approx((before["before"], before["after"]))
    assert means["each site alone, mean"] == pytest.approx(sum(means[name] for name in alone) / 2)
    for name in ("federated", "pooled", *alone):
        change = rows[name]["to_untuned"][metric]["difference"]["mean"]
        assert change == pytest.approx(means[name] - means["untuned"])
    assert "to_pooled" not in rows["pooled"]
    assert len(summary["comparison"]["verdicts"]) == 4
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "## What federating is worth" in card

    # As many steps as all clients took in all rounds.
    pooled = json.loads((run / "checkpoints" / "pooled" / f"1-{mode}" / "finished" / "result.json").read_text())
    assert pooled["steps"] == 8


@pytest.mark.slow
def test_a_comparison_is_resumed_where_it_stopped(
    simulate: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedrag_cli.commands import simulate as command

    _, whole = simulate("--compare")
    original, calls = command._train, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments[1].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(command, "_train", interrupted)
    _, stopped = simulate("--compare", folder="b", code=130)
    run = stopped["error"]["hint"].removeprefix("Go on with: fedrag resume ")
    assert main(["resume", run, "--json", "--quiet"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert calls == ["pooled", "site-0 alone", "site-0 alone", "site-1 alone"]
    assert resumed["comparison"] == whole["comparison"]


def test_a_comparison_needs_questions(simulate: Callable[..., Any]) -> None:
    data = {"validation": None, "test": None}
    _, wrong = simulate("--compare", dataset=data, code=2)
    assert "--compare needs questions" in wrong["error"]["message"]


def test_differential_privacy_is_told_wherever_rounds_are(
    simulate: Callable[..., Any], write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = simulate("federated.privacy={clipping_norm: 0.01, noise_multiplier: 2.0}")
    spent = [spent_epsilon(2.0, rounds, 1e-5) for rounds in (1, 2)]
    assert [row["epsilon"] for row in summary["rounds"]] == spent
    assert [event["epsilon"] for event in events(run, "round")] == spent
    updates = events(run, "client_update")
    assert all(event["clipped"] and event["norm"] > 0.01 for event in updates)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert f"epsilon {spent[1]:.4g} at delta 1e-05" in card
    config = write_config("b", trainer=SIMULATED_TRAINER, federated={"rounds": 1})
    privacy = "federated.privacy={clipping_norm: 1e-9, noise_multiplier: 1.0, at: client}"
    assert main(["simulate", str(config), privacy]) == 0
    printed = capsys.readouterr().err
    assert f"1 round spends epsilon {spent_epsilon(1.0, 1, 1e-5):.4g} at delta 1e-05" in printed
    assert f"epsilon {spent_epsilon(1.0, 1, 1e-5):.4g} at delta 1e-05," in printed


def test_what_rounds_and_baselines_keep_is_not_told_of_the_federations_weights(simulate: Callable[..., Any]) -> None:
    run, summary = simulate("--compare", "trainer.retriever.validation.every=epoch", "federated.rounds=1")
    assert {event["phase"] for event in events(run, "kept")} == {"round-1", "1-retriever"}
    assert "kept" not in summary
    assert "Weights that were kept" not in (run / "README.md").read_text(encoding="utf-8")


def test_each_site_searches_the_words_of_its_own_passages(
    simulate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = [{**row, "site": number % 2} for number, row in enumerate(data_rows()["corpus"])]
    dataset = {"corpus": {"path": str(write_rows(tmp_path / "owned.jsonl", corpus))}}
    tasks: list[FLTask] = []

    def task_of(*arguments: Any) -> FLTask:
        tasks.append(_task_of(*arguments))
        return tasks[-1]

    monkeypatch.setattr("fedrag_cli.commands.simulate._task_of", task_of)
    simulate("rag_system.lexical={}", dataset=dataset)
    assert len(tasks) == 2
    for number, task in enumerate(tasks):
        rag_system = task.trainer.rag_system
        assert rag_system.hybrid is not None
        own = rag_system.knowledge_store.nodes
        assert [node.id for node in own] == [row["id"] for row in corpus[number::2]]
        for position in (0, 11):
            assert rag_system.hybrid.lexical.search([own[position].text], 1)[1].tolist() == [[position]]
