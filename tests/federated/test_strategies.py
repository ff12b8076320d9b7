"""Every strategy by its name, through the rounds of a federation with clients that return known weights."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_strategies
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedMedian
from toy_federation import ToyClient
from toy_strategies import COMMON, EXAMPLES, STEPS, UNBOUNDED, federate, moved, strategy, toys

from fedrag_cli.errors import FederationError
from fedrag_cli.federated.checkpoint import RoundState, load_newest_round, save_missing, save_round
from fedrag_cli.federated.config import STRATEGIES
from fedrag_cli.federated.grid import InProcessGrid, Member
from fedrag_cli.federated.participants import Roster
from fedrag_cli.federated.strategies import restore_strategy, strategy_state
from fedrag_cli.federated.weights import Weights, to_wire
from fedrag_cli.registry import build, registry
from fedrag_cli.runs.reporter import SilentReporter


def test_every_strategy_of_the_issue_is_registered() -> None:
    assert set(registry().of_kind("strategy")) == set(STRATEGIES)
    assert len(STRATEGIES) == 12


def test_fedavg_is_the_mean_weighted_by_examples() -> None:
    assert moved(federate(strategy("FedAvg"), toys())) == pytest.approx([1 / 8, 4 / 8, 20 / 8], abs=1e-6)


def test_float16_on_the_wire_is_aggregated_as_float32() -> None:
    start = torch.tensor([0.1, 1.0 / 3.0, 3.0])
    clients = [ToyClient(name, [0.1, 0.01, 0.001], EXAMPLES[name], dtype="float16") for name in "abc"]
    clients[0].step = torch.tensor([0.7, 0.07, 0.007])
    told: list[dict[str, Any]] = []
    reporter = SilentReporter()
    reporter.event = lambda name, **fields: told.append({"event": name, **fields})  # type: ignore[method-assign]
    state = RoundState(0, {"w": start.clone()})
    after = federate(
        strategy("FedAvg"), clients, state=state, transport_dtype="float16", reporter=reporter, **UNBOUNDED
    )
    rounded = start.half().float()
    for client in clients:
        assert torch.equal(client.received[0]["w"], rounded)
    # What training has changed travels, and is added to the weights as the server has them.
    sent = {client.name: ((rounded + client.step) - rounded).half().double() for client in clients}
    mean = start.double() + sum(EXAMPLES[name] * change for name, change in sent.items()) / sum(EXAMPLES.values())
    assert after.weights["w"].dtype == torch.float32
    assert after.weights["w"].tolist() == pytest.approx(mean.tolist(), rel=2e-7)
    # The server keeps more than what travels; the clients end with what travelled.
    assert not torch.equal(after.weights["w"], after.weights["w"].half().float())
    for client in clients:
        assert client.final is not None
        assert torch.equal(client.final["w"], after.weights["w"].half().float())
    (started,) = [event for event in told if event["event"] == "round_started"]
    updates = [event for event in told if event["event"] == "client_update"]
    traffic = {started["bytes"], *(event["bytes_sent"] for event in updates), *(e["bytes_received"] for e in updates)}
    assert traffic == {3 * 2 + 128}
    norms = {event["client"]: event["norm"] for event in updates}
    assert norms["a"] == pytest.approx(float(sent["a"].norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedMedian"])
def test_steps_below_the_precision_of_a_float16_weight_add_up(name: str) -> None:
    # Weights of 3 lie 0.002 apart as float16, so these steps would be lost in weights that travel back.
    clients = [ToyClient(site, [1e-4, -1e-4, 2e-5], dtype="float16") for site in "abc"]
    state = RoundState(0, {"w": torch.full((3,), 3.0)})
    options = {"server_momentum": 0.0} if name == "FedAvgM" else {}
    after = federate(strategy(name, **options), clients, rounds=4, state=state, transport_dtype="float16")
    assert (after.weights["w"] - 3).tolist() == pytest.approx([4e-4, -4e-4, 8e-5], rel=0.02)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_takes_float16(name: str) -> None:
    def clients(dtype: Any) -> list[ToyClient]:
        # Steps and start are exact in float16, so only a wrong number format could make a difference.
        return [ToyClient(f"c{n}", [0.5, 0.25, n / 8], dtype=dtype) for n in range(7)]

    options = {"num_malicious_nodes": 1} if name in ("Krum", "MultiKrum", "Bulyan") else {}
    plain = federate(strategy(name, **options), clients("float32"), rounds=1)
    half = federate(strategy(name, **options), clients("float16"), rounds=1, transport_dtype="float16")
    assert moved(half) == pytest.approx(moved(plain), abs=1e-6)
    assert any(moved(half))


def test_a_global_value_that_float16_cannot_carry_ends_the_federation() -> None:
    clients = [ToyClient("a", [6e4, 0, 0], dtype="float16"), ToyClient("b", [6e4, 0, 0], dtype="float16")]
    state = RoundState(0, {"w": torch.tensor([1e5, 0.0, 0.0])})
    with pytest.raises(FederationError, match="The tensor w holds values above 65504"):
        federate(strategy("FedAvg"), clients, state=state, transport_dtype="float16")
    # A client refuses by itself, and the server names it.
    many = [*clients, ToyClient("c", [1e5, 0, 0], dtype="float16")]
    state = federate(strategy("FedAvg"), many, min_clients=2, transport_dtype="float16")
    assert state.history[0]["refused"] == {"c": "its work failed; its own messages say why"}


def test_fedavgm_keeps_momentum_over_rounds() -> None:
    one_step = np.array([1 / 8, 4 / 8, 20 / 8])
    after = federate(strategy("FedAvgM", server_momentum=0.5), toys(), rounds=2)
    # Two equal steps d: first d, then d + d / 2.
    assert moved(after) == pytest.approx(2.5 * one_step, abs=1e-5)


def test_fedprox_sends_its_mu_to_the_clients() -> None:
    clients = toys()
    federate(strategy("FedProx", proximal_mu=0.25), clients)
    assert {client.configs[0]["proximal-mu"] for client in clients} == {0.25}


def test_median_trimmed_mean_krum_and_bulyan_throw_out_a_liar() -> None:
    honest = [ToyClient(f"c{number}", [1.0, 1.0, 1.0 + number / 100]) for number in range(6)]
    liar = ToyClient("liar", [1e6, -1e6, 1e6])
    for chosen in (
        strategy("FedMedian"),
        strategy("FedTrimmedAvg", beta=0.2),
        strategy("Krum", num_malicious_nodes=1),
        strategy("MultiKrum", num_malicious_nodes=1, num_nodes_to_select=3),
        strategy("Bulyan", num_malicious_nodes=1),
    ):
        assert moved(federate(chosen, [*honest, liar])) == pytest.approx([1.0, 1.0, 1.0], abs=0.06), chosen.type
    unbounded = federate(strategy("FedAvg"), [*honest, liar], **UNBOUNDED)
    assert moved(unbounded)[0] > 1e5


def test_adaptive_strategies_step_towards_the_mean() -> None:
    for name in ("FedAdagrad", "FedAdam", "FedYogi"):
        step = moved(federate(strategy(name, eta=0.1), toys()))
        assert all(0 < value <= 0.11 for value in step), (name, step)
    # Adagrad: v = d^2, so the step is eta * d / (|d| + tau).
    adagrad = moved(federate(strategy("FedAdagrad", eta=0.1, tau=1e-3), toys()))
    assert adagrad == pytest.approx([0.1 * d / (d + 1e-3) for d in (0.125, 0.5, 2.5)], abs=1e-5)


def test_qfedavg_weighs_a_client_with_a_higher_loss_more() -> None:
    clients = [ToyClient("a", [1.0, 0, 0], 1, loss=4.0), ToyClient("b", [0, 1.0, 0], 1, loss=1.0)]
    even = moved(federate(strategy("QFedAvg", q=0.0), clients))
    assert even == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)
    fair = moved(federate(strategy("QFedAvg", q=1.0), clients))
    assert fair[0] == pytest.approx(4 * fair[1], rel=1e-5)


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_a_restarted_server_goes_on_with_the_strategys_state(name: str) -> None:
    whole = federate(strategy(name), toys(), rounds=4)
    saved: list[RoundState] = []

    def keep(state: RoundState) -> None:
        if state.number == 2 and not saved:
            weights = {key: tensor.clone() for key, tensor in state.weights.items()}
            saved.append(RoundState(2, weights, dict(state.strategy), list(state.history), {}))

    federate(strategy(name), toys(), rounds=4, save_round=keep)
    assert saved[0].strategy
    resumed = federate(strategy(name), toys(), rounds=4, state=saved[0])
    assert torch.equal(resumed.weights["w"], whole.weights["w"])


def test_state_and_restore_are_inverse() -> None:
    first = build("strategy", strategy("FedAdam"), min_clients=1, learning_rate=1.0)
    first.m_t, first.v_t = {"x": np.ones(2)}, {"x": np.zeros(2)}
    first.current_arrays = to_wire({"x": torch.ones(2)})
    other = build("strategy", strategy("FedAdam"), min_clients=1, learning_rate=1.0)
    restore_strategy(other, strategy_state(first))
    assert other.m_t["x"].tolist() == [1.0, 1.0]
    assert other.current_arrays["x"].numpy().tolist() == [1.0, 1.0]


def test_a_list_of_many_arrays_comes_back_from_disk_in_its_order(tmp_path: Path) -> None:
    """Names of files are texts, and "10" comes before "2"."""
    first = build("strategy", strategy("FedAvgM"), min_clients=1, learning_rate=1.0)
    first.momentum_vector = [np.full(1 + number % 2, float(number)) for number in range(13)]
    save_round(tmp_path, RoundState(1, {"w": torch.zeros(1)}, strategy_state(first)))
    saved = load_newest_round(tmp_path)
    assert saved is not None
    other = build("strategy", strategy("FedAvgM"), min_clients=1, learning_rate=1.0)
    restore_strategy(other, saved.strategy)
    assert [vector.tolist() for vector in other.momentum_vector] == [
        [float(number)] * (1 + number % 2) for number in range(13)
    ]


@pytest.mark.parametrize(("name", "setting"), [("FedAvgM", "server_learning_rate"), ("FedAdam", "eta")])
def test_aggregated_weights_that_are_not_finite_end_the_federation(name: str, setting: str) -> None:
    saved: list[int] = []
    chosen = strategy(name, **{setting: 1e39})
    with (
        np.errstate(all="ignore"),
        pytest.raises(FederationError, match=r"weights in round 1 that are not finite or of another shape: w"),
    ):
        federate(chosen, toys(), save_round=lambda state: saved.append(state.number))
    assert saved == [0]


def test_a_strategy_that_leaves_weights_out_ends_the_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedMedian, "aggregate_train", lambda *arguments: (ArrayRecord({}), None))
    saved: list[int] = []
    with pytest.raises(FederationError, match=r"The strategy made no weights named w in round 1\."):
        federate(strategy("FedMedian"), toys(), save_round=lambda state: saved.append(state.number))
    assert saved == [0]


def test_the_same_seed_draws_the_same_clients() -> None:
    def drawn() -> list[list[str]]:
        state = federate(strategy("FedAvg", fraction=0.5), many, rounds=5, min_clients=2)
        return [row["clients"] for row in state.history]

    many = [ToyClient(f"c{number}", [1.0, 0, 0]) for number in range(6)]
    first = drawn()
    assert drawn() == first
    assert {len(names) for names in first} == {3}
    assert len({tuple(names) for names in first}) > 1


def lying() -> ToyClient:
    return ToyClient("liar", [0, 0, 0], change=lambda weights: {"w": weights["w"] * float("nan")})


def test_a_refused_update_is_named_and_the_rest_go_on() -> None:
    state = federate(strategy("FedAvg"), [*toys(), lying()], min_clients=3)
    assert state.history[0]["refused"] == {"liar": "w holds values that are not finite"}
    assert moved(state) == pytest.approx([1 / 8, 4 / 8, 20 / 8], abs=1e-6)


def test_an_update_with_a_negative_loss_is_refused() -> None:
    """Strategies that weigh clients by their loss would turn its update round."""
    state = federate(strategy("FedAvg"), [*toys(), ToyClient("gainer", [9, 9, 9], loss=-1e-3)], min_clients=3)
    assert state.history[0]["refused"] == {"gainer": "its loss -0.001 is not between 0 and 1e+06"}
    assert moved(state) == pytest.approx([1 / 8, 4 / 8, 20 / 8], abs=1e-6)
    free = federate(strategy("FedAvg"), [*toys(), ToyClient("perfect", [0, 0, 0], loss=0.0)])
    assert free.history[0]["refused"] == {}


def test_below_the_quorum_the_round_fails() -> None:
    with pytest.raises(FederationError, match=r"Round 1 has 3 usable updates, but needs 4; liar: w holds"):
        federate(strategy("FedAvg"), [*toys(), lying()])


def test_a_strategy_that_gives_no_weights_fails_the_round() -> None:
    with pytest.raises(FederationError, match="gave no weights for the 3 updates"):
        federate(strategy("Bulyan", num_malicious_nodes=1), toys())


def test_a_client_that_raises_is_counted_as_failed() -> None:
    class Raising(ToyClient):
        def __call__(self, message: Message) -> Message:
            if message.metadata.message_type == "train":
                raise RuntimeError("private text")
            return super().__call__(message)

    state = federate(strategy("FedAvg"), [*toys(), Raising("broken", [0, 0, 0])], min_clients=3)
    assert state.history[0]["refused"] == {"broken": "its work failed; its own messages say why"}


def test_a_server_that_died_while_handing_out_does_so_when_it_is_resumed() -> None:
    clients = toys()
    done = federate(strategy("FedAvg"), clients, rounds=2)
    again = toys()
    resumed = federate(strategy("FedAvg"), again, rounds=2, state=done)
    assert resumed.number == 2
    assert all(client.final is not None and torch.equal(client.final["w"], done.weights["w"]) for client in again)
    assert not any(client.configs for client in again)


class Watched(SilentReporter):
    """Keeps how many clients were waited for."""

    def __init__(self) -> None:
        self.waits: list[int] = []

    def event(self, name: str, **fields: Any) -> None:
        if name == "waiting":
            self.waits.append(fields["wanted"])


def test_who_has_the_final_weights_is_remembered_as_it_confirms() -> None:
    saved: list[tuple[list[str] | None, int]] = []
    keep = {"save_missing": lambda state: saved.append((list(state.missing or []), len(state.weights)))}
    done = federate(strategy("FedAvg"), toys(), **keep)
    # Nobody is known to have them before; each confirmation takes one off.
    assert [missing for missing, _ in saved] == [["a", "b", "c"], ["b", "c"], ["c"], []]
    assert done.missing == []

    class Dying(ToyClient):
        def __call__(self, message: Message) -> Message:
            if message.content.config_records["config"].get("final"):
                raise KeyboardInterrupt
            return super().__call__(message)

    saved.clear()
    clients = [toys()[0], Dying("b", STEPS["b"], EXAMPLES["b"]), toys()[2]]
    with pytest.raises(KeyboardInterrupt):
        federate(strategy("FedAvg"), clients, **keep)
    assert saved[-1][0] == ["b", "c"]


def test_what_clients_measured_of_the_final_weights_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    class Measuring(ToyClient):
        """Measures as many questions as it has examples; `b` kills the first server."""

        killed = False

        def __call__(self, message: Message) -> Message:
            reply = super().__call__(message)
            if self.final is not None:
                if self.name == "b" and not Measuring.killed:
                    Measuring.killed = True
                    raise KeyboardInterrupt
                reply.content["metrics"]["validation-examples"] = self.examples  # type: ignore[index]
                reply.content["metrics"]["validation_loss"] = float(ord(self.name))  # type: ignore[index]
            return reply

    def clients(names: str) -> list[ToyClient]:
        return [Measuring(name, STEPS[name], EXAMPLES[name]) for name in names]

    keep = {
        "save_round": lambda state: save_round(tmp_path, state),
        "save_missing": lambda state: save_missing(tmp_path, state),
    }
    with pytest.raises(KeyboardInterrupt):
        federate(strategy("FedAvg"), clients("abc"), **keep)
    # `a` has the weights and is gone; `c` stays away until a third server.
    told: list[int] = []
    for names in ("b", "c"):
        resumed = federate(strategy("FedAvg"), clients(names), state=load_newest_round(tmp_path), min_clients=1, **keep)
        measured = resumed.evaluations["1"]["clients"]
        told.append(measured["examples"])
    assert told == [3, 8]
    assert measured["metrics"]["validation_loss"] == pytest.approx((97 + 2 * 98 + 5 * 99) / 8)
    assert resumed.missing == []


def test_a_resumed_server_waits_for_no_client_that_has_the_final_weights() -> None:
    done = federate(strategy("FedAvg"), toys())
    # Two have them and are gone, the third is there; `gather_timeout` would be ten minutes.
    done.missing = ["c"]
    clients, watched = [toys()[2]], Watched()
    resumed = federate(strategy("FedAvg"), clients, state=done, reporter=watched, min_clients=3)
    assert watched.waits == []
    assert clients[0].final is not None
    assert torch.equal(clients[0].final["w"], done.weights["w"])
    assert resumed.missing == []
    # All are gone and nothing is known: it waits rejoin_timeout, and tells whom it has not reached.
    done.missing = None
    alone = federate(strategy("FedAvg"), [ToyClient("stranger", [0, 0, 0])], state=done, min_clients=3)
    assert alone.missing == ["a", "b", "c"]


def test_a_key_that_comes_back_under_another_name_is_one_client() -> None:
    client = ToyClient("first", [0, 0, 0])
    grid = InProcessGrid({"x": client})  # type: ignore[dict-item]
    roster = Roster(grid, COMMON, SilentReporter())
    roster.refresh()
    assert [participant.name for participant in roster.ready()] == ["x"]
    member = Member(2, "", "abcdef123456", 2)
    grid.members = lambda: [member]  # type: ignore[method-assign]
    roster.refresh()
    assert [participant.name for participant in roster.ready()] == ["first"]
    client.name = "second"
    member = Member(2, "", "abcdef123456", 3)
    roster.refresh()
    assert [participant.name for participant in roster.ready()] == ["second"]
    assert roster.find("first") is None


def test_a_client_that_answers_its_earlier_greeting_and_leaves_is_refused_in_words() -> None:
    """A client looks whether the server is there, leaves, comes back, and answers what was sent to its first visit."""

    class Late(InProcessGrid):
        """Replies to the first greeting come only after the second visit began; the second one is never answered."""

        visit = 1

        def members(self) -> list[Member]:
            return [Member(2, "x", "abcdef123456", self.visit)]

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            wanted = list(message_ids)
            if self.visit == 1:
                self.first = wanted
                return []
            return super().pull_messages([message_id for message_id in wanted if message_id in self.first])

    client = ToyClient("x", [0, 0, 0], agreement=dataclasses.replace(COMMON, side="generator"))
    grid, told = Late({"x": client}), []  # type: ignore[dict-item]
    reporter = SilentReporter()
    reporter.event = lambda name, **fields: told.append((name, fields["status"], fields["reason"]))  # type: ignore[method-assign]
    roster = Roster(grid, COMMON, reporter)
    roster.refresh()
    assert told == []
    grid.visit = 2
    roster.refresh()
    roster.refresh()
    assert told == [("client", "refused", "tunes the generator, but the server the retriever (trainer.mode)")]


def test_reasons_with_brackets_do_not_break_the_table() -> None:
    from rich.console import Console

    from fedrag_cli.cli.federation_view import Board

    board = Board()
    board.apply("client", {"client": "[bold]", "status": "refused", "reason": 'template is "[/INST]"'})
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(board.render())
    shown = console.export_text()
    assert "[/INST]" in shown
    assert "[bold]" in shown


class Leaving(InProcessGrid):
    """A grid whose clients may be away."""

    away: set[str]

    def members(self) -> list[Member]:
        return [member for member in super().members() if member.name not in self.away]


def test_a_client_that_misses_the_end_is_named_and_gets_the_model_from_a_resumed_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toy_strategies, "InProcessGrid", Leaving)
    clients, told = toys(), []
    monkeypatch.setattr(Leaving, "away", set(), raising=False)
    reporter = SilentReporter()
    reporter.event = lambda name, **fields: told.append((name, fields))  # type: ignore[method-assign]

    def leave(weights: Weights) -> Weights:
        Leaving.away = {"c"}
        return weights

    clients[2].change = leave
    done = federate(strategy("FedAvg"), clients, reporter=reporter)
    assert done.missing == ["c"]
    final = {
        fields["client"]: (fields["received"], fields["reason"]) for name, fields in told if name == "client_final"
    }
    assert final == {"a": (True, ""), "b": (True, ""), "c": (False, "it is away")}
    assert clients[2].final is None
    Leaving.away = {"a", "b"}
    weights = done.weights["w"].clone()
    resumed = federate(strategy("FedAvg"), clients, state=done)
    assert resumed.missing == []
    assert resumed.number == 1
    assert clients[2].final is not None
    assert torch.equal(clients[2].final["w"], weights)


def test_a_client_that_comes_back_with_another_key_takes_its_name_over() -> None:
    client = ToyClient("b", [0, 0, 0])
    grid = InProcessGrid({"x": client, "y": client})  # type: ignore[dict-item]
    told: list[tuple[str, str]] = []
    reporter = SilentReporter()
    reporter.event = lambda name, **fields: told.append((fields["client"], fields["status"]))  # type: ignore[method-assign]
    roster = Roster(grid, COMMON, reporter)
    first, second = Member(2, "", "aaaaaa000000", 1), Member(3, "", "bbbbbb000000", 1)
    grid.members = lambda: [first]  # type: ignore[method-assign]
    roster.refresh()
    grid.members = lambda: [first, second]  # type: ignore[method-assign]
    roster.refresh()
    assert [participant.name for participant in roster.ready()] == ["b", "b-bbbbbb"]
    grid.members = lambda: [second]  # type: ignore[method-assign]
    roster.refresh()
    assert [(participant.name, participant.node_id) for participant in roster.ready()] == [("b", 3)]
    assert told == [("b", "ready"), ("b-bbbbbb", "ready"), ("b", "offline"), ("b", "ready")]
