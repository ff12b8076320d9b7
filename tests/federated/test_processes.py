"""Federations of real processes over loopback: what goes well, and what goes wrong, with real kills."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import PATIENCE, Federation, assert_same_weights, events, tuned_weights
from flwr.app import ConfigRecord, Message, RecordDict
from toy_federation import spent_epsilon

from fedrag_cli.commands.serve import task_without_data
from fedrag_cli.config import load_config
from fedrag_cli.federated.fleet.server import FleetServer
from fedrag_cli.federated.participants import Exchange, Roster
from fedrag_cli.federated.weights import Weights, from_wire, to_wire
from fedrag_cli.runs.metrics_log import read_events, seconds_spent
from fedrag_cli.runs.reporter import SilentReporter

pytestmark = pytest.mark.fl
# Rounds that last long enough to be disturbed in their middle.
SLOW_ROUNDS = {"retriever": {"epochs": 25, "save_every": 10}}


@pytest.fixture
def federate(tmp_path: Path, models: dict[str, Path]) -> Iterator[Callable[..., Federation]]:
    """Return a function that makes a federation; what still runs at the end is killed."""
    made: list[Federation] = []

    def make(name: str = "federation", **options: Any) -> Federation:
        made.append(Federation(tmp_path / name, models, **options))
        return made[-1]

    yield make
    for federation in made:
        federation.stop()


def run_undisturbed(federation: Federation, server_overrides: tuple[str, ...] = ()) -> Path:
    """Run a federation to its end and return the server's run directory."""
    server = federation.serve(*server_overrides)
    clients = [federation.join(site) for site in range(federation.sites)]
    summary = server.finish()
    for client in clients:
        client.finish()
    return Path(summary["run_dir"])


def test_every_client_ends_with_the_servers_model(federate: Callable[..., Federation]) -> None:
    federation = federate()
    server, clients = federation.serve(), [federation.join(site) for site in range(2)]
    summary = server.finish()
    assert [row["clients"] for row in summary["rounds"]] == [["site0", "site1"]] * 2
    assert summary["evaluations"]["0"]["clients"]["examples"] == 4
    assert set(summary["evaluations"]) == {"0", "1", "2"}
    for client in clients:
        run = Path(client.finish()["run_dir"])
        assert_same_weights(run, Path(summary["run_dir"]))
        assert "with num-examples 7, validation-examples, loss, validation_loss" in client.log
    updates = events(Path(summary["run_dir"]), "client_update")
    assert [(event["round"], event["accepted"]) for event in updates] == [(1, True)] * 2 + [(2, True)] * 2
    losses = {event["client"]: event["metrics"]["loss"] for event in updates[:2]}
    assert losses["site0"] != losses["site1"]
    assert (Path(summary["run_dir"]) / "plots" / "federation.png").stat().st_size > 10_000


def test_one_client_and_one_round_equal_training_without_a_federation(federate: Callable[..., Federation]) -> None:
    federation = federate(sites=1, federated={"rounds": 1})
    run_undisturbed(federation)
    (client,) = (federation.folder / "runs" / "site0").iterdir()
    alone = federation.start("train", ["train", "site0.yaml"])
    run = Path(alone.finish()["run_dir"])
    theirs = tuned_weights(client)
    for name, tensor in tuned_weights(run).items():
        assert (theirs[name] - tensor).abs().max() <= 1e-6, name


def test_adapters_of_the_generator(federate: Callable[..., Federation]) -> None:
    federation = federate(trainer={"mode": "generator"}, federated={"metrics": ["loss", "validation_loss", "f1"]})
    server, clients = federation.serve(), [federation.join(site, "evaluation.metrics=[f1]") for site in range(2)]
    summary = server.finish()
    run = Path(summary["run_dir"])
    assert (run / "generator" / "adapter_config.json").exists()
    assert set(summary["evaluations"]["2"]["clients"]["metrics"]) == {"validation_loss", "f1"}
    for client in clients:
        assert_same_weights(Path(client.finish()["run_dir"]), run, "generator")
    sent = events(run, "client_update")[0]["bytes_received"]
    assert sent == sum(tensor.numel() * 4 + 128 for tensor in tuned_weights(run, "generator").values())


def test_a_client_that_is_killed_and_restarted_changes_nothing(federate: Callable[..., Federation]) -> None:
    undisturbed = run_undisturbed(federate("undisturbed", trainer=SLOW_ROUNDS))
    federation = federate("disturbed", trainer=SLOW_ROUNDS)
    server, clients = federation.serve(), [federation.join(site) for site in range(2)]
    clients[0].wait_for("Round 2 of 2: received the global model")
    clients[0].kill()
    again = federation.resume(clients[0].run_directory(), "site0-again")
    summary = server.finish()
    clients[1].finish()
    again.finish()
    assert_same_weights(Path(summary["run_dir"]), undisturbed)
    assert_same_weights(clients[0].run_directory(), undisturbed)
    assert all(event["accepted"] for event in events(Path(summary["run_dir"]), "client_update"))


def test_a_server_that_is_killed_and_resumed_changes_nothing(federate: Callable[..., Federation]) -> None:
    undisturbed = run_undisturbed(federate("undisturbed", trainer=SLOW_ROUNDS))
    federation = federate("disturbed", trainer=SLOW_ROUNDS)
    server, clients = federation.serve(), [federation.join(site) for site in range(2)]
    clients[0].wait_for("Round 2 of 2: received the global model")
    server.kill()
    clients[0].wait_for("does not answer")
    again = federation.resume(server.run_directory(), "server-again")
    summary = again.finish()
    for client in clients:
        client.finish()
        assert "Connected again" in client.log
    assert_same_weights(Path(summary["run_dir"]), undisturbed)
    assert [row["round"] for row in summary["rounds"]] == [1, 2]


def test_a_client_that_never_answers_is_left_behind(federate: Callable[..., Federation]) -> None:
    federation = federate(sites=3, federated={"min_clients": 2, "wait_for_clients": 3, "round_timeout": 25.0})
    server, clients = federation.serve(), [federation.join(site) for site in range(3)]
    clients[2].wait_for("Round 1 of 2: received the global model")
    clients[2].process.send_signal(signal.SIGSTOP)
    summary = server.finish()
    assert "site2" in summary["rounds"][0]["refused"]
    assert summary["rounds"][0]["refused"]["site2"].startswith(("it did not answer within 25 s", "it went away"))
    assert summary["rounds"][0]["clients"] == ["site0", "site1"]
    for client in clients[:2]:
        client.finish()


def test_other_models_and_other_settings_are_refused_in_words(
    federate: Callable[..., Federation], models: dict[str, Path]
) -> None:
    federation = federate(sites=3, federated={"min_clients": 1})
    server = federation.serve("federated.wait_for_clients=1", "federated.rounds=4")
    other_model = federation.join(1, f"rag_system.retriever.model={models['other_retriever']}")
    other_settings = federation.join(2, "trainer.retriever.lm_temperature=0.5", "trainer.retriever.batch_size=2")
    other_model.wait_for("Error")
    other_settings.wait_for("Error")
    fitting = federation.join(0)
    assert other_model.finish(4)["error"]["exit_code"] == 4
    assert "another passage encoder model" in other_model.log
    other_settings.finish(4)
    assert "trainer.retriever.lm_temperature is 0.5, but the server has 0.1" in other_settings.log
    assert "retriever.batch_size" not in other_settings.log
    summary = server.finish()
    fitting.finish()
    assert "Client site1 is refused: another passage encoder model" in server.log
    assert "Client site2 is refused: trainer.retriever.lm_temperature is 0.5" in server.log
    assert all(row["clients"] == ["site0"] for row in summary["rounds"])


def test_too_few_clients_fail_with_5_and_the_federation_can_be_resumed(federate: Callable[..., Federation]) -> None:
    federation = federate(federated={"gather_timeout": 8.0})
    server, client = federation.serve(), federation.join(0)
    error = server.finish(5)["error"]
    assert error["message"].startswith("1 of 2 clients were there after 8 s")
    assert client.finish(5)["error"]["type"] == "FederationError"
    again = federation.resume(server.run_directory(), "server-again")
    clients = [federation.join(site, name=f"site{site}-again") for site in range(2)]
    assert len(again.finish()["rounds"]) == 2
    for client in clients:
        client.finish()


def test_clients_that_all_fail_end_with_5(federate: Callable[..., Federation]) -> None:
    # NaN appears after the first step, in the clients' own training.
    federation = federate(trainer={"retriever": {"learning_rate": 1e30, "max_grad_norm": 0.0}})
    server, clients = federation.serve(), [federation.join(site) for site in range(2)]
    error = server.finish(5)["error"]
    assert "Round 1 has 0 usable updates, but needs 2" in error["message"]
    assert "site0: its work failed" in error["message"]
    for client in clients:
        client.finish(5)
        assert "not finite" in client.log
    assert server.run_directory().joinpath("checkpoints", "round-0000").is_dir()


def test_ctrl_c_on_a_client_and_on_the_server_saves_and_both_go_on(federate: Callable[..., Federation]) -> None:
    federation = federate(trainer=SLOW_ROUNDS)
    server, clients = federation.serve(), [federation.join(site) for site in range(2)]
    clients[1].wait_for("Round 1 of 2: received the global model")
    clients[1].process.send_signal(signal.SIGINT)
    clients[1].finish(130)
    assert "Go on with: fedrag resume" in clients[1].log
    server.process.send_signal(signal.SIGTERM)
    server.finish(130)
    again = federation.resume(server.run_directory(), "server-again")
    back = federation.resume(clients[1].run_directory(), "site1-again")
    assert len(again.finish()["rounds"]) == 2
    clients[0].finish()
    back.finish()


def test_a_client_that_was_away_at_the_end_gets_the_model_later(federate: Callable[..., Federation]) -> None:
    federation = federate(
        sites=3, trainer=SLOW_ROUNDS, federated={"min_clients": 2, "wait_for_clients": 3, "rejoin_timeout": 4.0}
    )
    server, clients = federation.serve(), [federation.join(site) for site in range(3)]
    clients[2].wait_for("Round 2 of 2: received the global model")
    clients[2].kill()
    summary = server.finish()
    assert summary["missing"] == ["site2"]
    assert "Without the final model: site2. When they are back, hand it out with: fedrag resume" in server.log
    for client in clients[:2]:
        client.finish()
    again = federation.resume(server.run_directory(), "server-again")
    back = federation.resume(clients[2].run_directory(), "site2-again")
    assert again.finish()["missing"] == []
    back.finish()
    assert_same_weights(clients[2].run_directory(), server.run_directory())
    thrice = federation.resume(server.run_directory(), "server-thrice")
    thrice.finish()
    assert "is finished already" in thrice.log


class HostileServer:
    """The server of a federation that sends what it likes, to one client that is a process of its own."""

    def __init__(self, federation: Federation, server: FleetServer) -> None:
        config = load_config(federation.folder / "server.yaml")
        self.task = task_without_data(config)
        assert server.grid is not None
        self.grid = server.grid

    def meet(self) -> None:
        """Wait until a client has shaken hands."""
        self.roster = Roster(self.grid, self.task.agreement, SilentReporter(), 2)
        end = time.monotonic() + PATIENCE
        while not self.roster.ready():
            assert time.monotonic() < end
            self.roster.refresh()
            time.sleep(0.05)

    def send(self, weights: Weights, kind: str = "train", **config: Any) -> Weights | str:
        """Return the weights that come back, none for other kinds of messages, or why nothing came."""
        (client,) = self.roster.ready()
        told = ConfigRecord({"rounds": 99, **config})
        content = RecordDict({"arrays": to_wire(weights), "config": told})
        found: list[Weights | str] = []

        def take(name: str, reply: Message, seconds: float) -> None:
            found.extend(from_wire(record) for record in reply.content.array_records.values())

        Exchange(self.grid, self.roster, 5.0).run(
            [Message(content, client.node_id, kind)], PATIENCE, take, lambda name, reason: found.append(reason)
        )
        return found[0] if found else {}


@pytest.fixture
def hostile(federate: Callable[..., Federation]) -> Iterator[Callable[..., tuple[Federation, HostileServer]]]:
    """Return a function that makes a federation of one site whose server is hostile."""
    with ExitStack() as stack:

        def make(**sections: Any) -> tuple[Federation, HostileServer]:
            federation = federate(sites=1, **sections)
            server = stack.enter_context(FleetServer("127.0.0.1", federation.port))
            return federation, HostileServer(federation, server)

        yield make


def test_a_client_gives_no_more_noisy_updates_than_were_agreed(hostile: Callable[..., Any]) -> None:
    privacy = {"at": "client", "clipping_norm": 0.1, "noise_multiplier": 2.0}
    federation, server = hostile(federated={"privacy": privacy})
    start = server.task.weights()
    others = {name: tensor + 0.01 for name, tensor in start.items()}
    client = federation.join(0)
    server.meet()
    updates = [server.send(start, **{"server-round": 1})]
    client.kill()
    again = federation.resume(client.run_directory(), "again")
    server.meet()
    # Who is asked the same again gives the same again, also after it was killed.
    updates += [server.send(start, **{"server-round": 1}), server.send(others, **{"server-round": 2})]
    one, repeated, two = updates
    assert all(torch.equal(one[name], repeated[name]) for name in start)
    assert not any(torch.equal(one[name], two[name]) for name in start)
    assert server.send(others, **{"server-round": 3}) == "its work failed; its own messages say why"
    again.finish(5)
    assert "The server asks for round 3, but 2 rounds were agreed." in again.log
    assert f"own noise has spent epsilon {spent_epsilon(2.0, 2, 1e-5):.4g} at delta 1e-05" in again.log
    # A server that begins anew finds a client that has given what it agreed to.
    thrice = federation.resume(client.run_directory(), "thrice")
    server.meet()
    assert server.send(start, **{"server-round": 2}) == "its work failed; its own messages say why"
    thrice.finish(5)
    assert "This client has given 2 noisy updates, as many as federated.rounds" in thrice.log
    assert json.loads((client.run_directory() / "federation" / "rounds.json").read_text())["noises"] == [
        {"round": 1, "noise_multiplier": 2.0},
        {"round": 2, "noise_multiplier": 2.0},
    ]


def test_a_site_without_validation_data_keeps_no_model_that_is_not_finite(hostile: Callable[..., Any]) -> None:
    federation, server = hostile()
    federation.write_site(0, dataset={"validation": None})
    client = federation.join(0)
    server.meet()
    start = server.task.weights()
    assert not isinstance(server.send(start, **{"server-round": 1}), str)
    spoilt = {name: tensor * float("nan") for name, tensor in start.items()}
    assert server.send(spoilt, "evaluate", final=True, **{"server-round": 1}).startswith("its work failed")
    client.finish(5)
    assert "The global model holds values that are not finite, in " in client.log
    run = client.run_directory()
    assert not (run / "retriever").exists()
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_both_sides_in_the_same_words_and_their_seconds_add_up(
    federate: Callable[..., Federation], end: signal.Signals
) -> None:
    federation = federate(sites=1, trainer=SLOW_ROUNDS)
    server, client = federation.serve(), federation.join(0)
    client.wait_for("Round 2 of 2: received the global model")
    for process in (client, server):
        process.process.send_signal(end)
    runs = {process.name: process.run_directory() for process in (client, server)}
    for process in (client, server):
        assert process.finish(130)["error"]["type"] == "RunInterruptedError"
        assert f"Go on with: fedrag resume {runs[process.name]}" in process.log
        assert json.loads((runs[process.name] / "manifest.json").read_text())["status"] == "interrupted"
    again = [federation.resume(run, f"{name}-again") for name, run in runs.items()]
    for process, summary in zip(again, [process.finish() for process in again], strict=True):
        spent = seconds_spent(read_events(Path(summary["run_dir"]) / "metrics.jsonl"))
        first = events(Path(summary["run_dir"]), "started")
        assert len(first) == 2, process.name
        assert summary["seconds"] >= spent - 0.1
        assert summary["seconds"] > sum(row.get("seconds", 0.0) for row in summary["rounds"])
