"""Differential privacy: clipped updates that all count the same, noise that nobody can take off, and its epsilon."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fl_tasks import make_manager
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from toy_federation import ToyClient, asking, common, spent_epsilon
from toy_strategies import federate, moved, strategy, toys

from fedrag_cli.cli.federation_view import federation_line
from fedrag_cli.config import load_config
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.config.schema import FederatedConfig, PrivacyConfig
from fedrag_cli.errors import ConfigError, FederationError, ModelError, ServerRefusedError
from fedrag_cli.federated.checkpoint import ClientRounds, FitResult, RoundState, load_newest_round, save_round
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.flower_api import ScreenedStrategy
from fedrag_cli.federated.handshake import differences
from fedrag_cli.federated.privacy import (
    clip_scale,
    epsilon_of_ledger,
    largest_noisy_norm,
    ledger_entry,
    noise_of_client,
    privacy_record,
    protected,
)
from fedrag_cli.federated.weights import from_wire, to_wire
from fedrag_cli.runs.reporter import SilentReporter

# So little that it is lost in float32: what is left is clipping and weighing.
SILENT = 1e-12


def private(norm: float, noise: float = SILENT, **settings: Any) -> PrivacyConfig:
    return PrivacyConfig(clipping_norm=norm, noise_multiplier=noise, **settings)


def integrated_delta(mu: float, epsilon: float) -> float:
    """Return the integral of max(p - e^epsilon q, 0) for normal densities p and q whose means lie mu apart."""
    grid = np.linspace(-20, 20 + mu, 2_000_001)
    p, q = (np.exp(-((grid - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (mu, 0.0))
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * (grid[1] - grid[0]))


@pytest.mark.parametrize(
    ("noise", "rounds", "delta"), [(1.0, 1, 1e-5), (1.0, 3, 1e-5), (0.7, 1, 1e-3), (4.0, 50, 1e-6), (3.730632, 1, 1e-5)]
)
def test_epsilon_is_what_the_definition_gives(noise: float, rounds: int, delta: float) -> None:
    epsilon = spent_epsilon(noise, rounds, delta)
    assert integrated_delta(math.sqrt(rounds) / noise, epsilon) == pytest.approx(delta, rel=1e-4)


def test_epsilon_of_known_and_of_extreme_settings() -> None:
    # The noise that the analytic Gaussian mechanism needs for epsilon 1.
    assert spent_epsilon(3.730632, 1, 1e-5) == pytest.approx(1.0, abs=1e-5)
    assert spent_epsilon(1.0, 0, 1e-5) == 0
    assert spent_epsilon(1e9, 1, 1e-5) == 0
    assert spent_epsilon(1.0, 4, 1e-5) == pytest.approx(spent_epsilon(0.5, 1, 1e-5), rel=1e-12)
    spent = [spent_epsilon(1.0, rounds, 1e-5) for rounds in range(1, 20)]
    assert spent == sorted(spent)
    # Almost no noise is almost no privacy, not a number that rounding has made small.
    for noise in (0.011, 0.0099, 1e-6, SILENT):
        assert spent_epsilon(noise, 1, 1e-5) > 0.5 / noise**2


def test_long_updates_are_scaled_and_short_ones_stay() -> None:
    assert [clip_scale(norm, 2.0) for norm in (0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 1.0, 0.25]
    state = federate(strategy("FedAvg"), toys(), privacy=private(2.0))
    # Steps of length 1, 2 and 4; examples of 1, 2 and 5 make no difference.
    assert moved(state) == pytest.approx([1 / 3, 2 / 3, 2 / 3], abs=1e-6)


@pytest.mark.parametrize("name", ["FedAvgM", "FedProx", "FedAvg"])
def test_means_of_float16_updates_are_clipped_alike(name: str) -> None:
    options = {"server_momentum": 0.0} if name == "FedAvgM" else {}
    clients = [
        ToyClient(site, step, n, dtype="float16")
        for site, step, n in (("a", [6.0, 8.0, 0.0], 9), ("b", [0.0, 0.0, 1.0], 1))
    ]
    state = federate(strategy(name, **options), clients, transport_dtype="float16", privacy=private(5.0))
    assert moved(state) == pytest.approx([1.5, 2.0, 0.5], abs=1e-5)


def noisy(noise: float, size: int, strategy_config: Any, clients: int = 4, **settings: Any) -> RoundState:
    toys = [ToyClient(f"c{n}", [0.0] * size, examples=n + 1, agreement=common(size)) for n in range(clients)]
    state = RoundState(0, {"w": torch.zeros(size)})
    return federate(strategy_config, toys, state=state, privacy=private(8.0, noise, **settings))


def test_the_noise_on_the_mean_has_the_size_that_epsilon_is_computed_from() -> None:
    weights = noisy(0.5, 100_000, strategy("FedAvg")).weights["w"]
    # noise_multiplier * clipping_norm / clients
    assert float(weights.std()) == pytest.approx(0.5 * 8.0 / 4, rel=0.02)
    assert abs(float(weights.mean())) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([weights[:-1], weights[1:]]))[0, 1])) < 0.02


def test_no_seed_repeats_the_noise() -> None:
    def drawn() -> torch.Tensor:
        np.random.seed(0)
        torch.manual_seed(0)
        return noisy(0.5, 1000, strategy("FedAvg")).weights["w"]

    first, second = drawn(), drawn()
    # Two of a thousand draws may be alike by chance, once in some hundred runs.
    assert int(torch.isclose(first, second).sum()) < 3


def test_noise_comes_before_the_strategys_step() -> None:
    # However large d is, Flower's Adam first takes eta * sqrt(1 - beta_2 ** 2) * d / sqrt((1 - beta_2) * d ** 2).
    weights = noisy(1000.0, 2000, strategy("FedAdam", eta=0.01, beta_1=0.0)).weights["w"]
    assert float(weights.abs().max()) == pytest.approx(0.01 * math.sqrt((1 - 0.99**2) / (1 - 0.99)), rel=1e-3)
    assert 800 < int((weights > 0).sum()) < 1200


def test_every_round_tells_what_was_spent() -> None:
    told: list[dict[str, Any]] = []
    reporter = SilentReporter()
    reporter.event = lambda name, **fields: told.append({"event": name, **fields})  # type: ignore[method-assign]
    state = federate(strategy("FedAvg"), toys(), rounds=3, reporter=reporter, privacy=private(2.0, 1.5, delta=1e-4))
    spent = [spent_epsilon(1.5, rounds, 1e-4) for rounds in (1, 2, 3)]
    assert [row["epsilon"] for row in state.history] == spent
    assert [(event["epsilon"], event["delta"]) for event in told if event["event"] == "round"] == [
        (epsilon, 1e-4) for epsilon in spent
    ]
    first = {
        event["client"]: event["clipped"] for event in told if event["event"] == "client_update" and event["round"] == 1
    }
    assert first == {"a": False, "b": False, "c": True}
    plain = federate(strategy("FedAvg"), toys())
    assert "epsilon" not in plain.history[0]


def test_replacing_a_sites_updates_costs_more_than_zeroing_them() -> None:
    ledger = [ledger_entry(private(1.0, 1.0), 3)] * 3
    record = privacy_record(ledger)
    assert (record["epsilon"], record["epsilon_replaced"]) == (
        pytest.approx(8.3854, abs=1e-3),
        pytest.approx(20.125, abs=1e-3),
    )
    # A sum of updates moves by two clipping norms instead of one, which is one norm at half the noise.
    assert record["epsilon_replaced"] == spent_epsilon(0.5, 3, 1e-5)
    assert integrated_delta(2 * math.sqrt(3), float(record["epsilon_replaced"] or 0)) == pytest.approx(1e-5, rel=1e-3)


def test_rounds_of_unlike_noise_compose_by_their_squares() -> None:
    noises = (1.0, 2.0, 0.7, 2.0)
    ledger = [ledger_entry(private(1.0, noise), 3) for noise in noises]
    mu = math.sqrt(sum(1 / noise**2 for noise in noises))
    assert integrated_delta(mu, epsilon_of_ledger(ledger, 1e-4)) == pytest.approx(1e-4, rel=1e-4)
    assert epsilon_of_ledger([*ledger, None], 1e-4) == math.inf
    assert epsilon_of_ledger([], 1e-4) == 0.0
    assert epsilon_of_ledger([ledger_entry(private(1.0, 5e-324), 3)], 1e-4) == math.inf


def resumed(first: PrivacyConfig | None, then: PrivacyConfig | None, folder: Path, reporter: Any) -> RoundState:
    """Return the state of two rounds with some settings, and of one more after a restart with others."""
    settings = {"privacy": first, "save_round": lambda state: save_round(folder, state)}
    federate(strategy("FedAvg"), toys(), rounds=2, **settings)
    state = load_newest_round(folder)
    assert state is not None
    return federate(strategy("FedAvg"), toys(), rounds=3, state=state, privacy=then, reporter=reporter)


@pytest.mark.parametrize(
    ("first", "then", "epsilon"),
    [
        # The two rounds with little noise are what costs; told was .29, which is that of three rounds with much.
        (0.1, 20.0, 159.32),
        (20.0, 0.1, 91.83),
        (20.0, 20.0, 0.29127),
        (None, 20.0, None),
        (20.0, None, None),
        (None, None, "none"),
    ],
)
def test_a_resumed_run_tells_what_all_its_rounds_have_spent(
    first: float | None, then: float | None, epsilon: Any, tmp_path: Path
) -> None:
    told: list[str] = []
    reporter = SilentReporter()
    reporter.note = told.append  # type: ignore[method-assign]
    settings = [None if noise is None else private(1.0, noise) for noise in (first, then)]
    row = resumed(*settings, tmp_path, reporter).history[-1]
    if epsilon == "none":
        assert not {"epsilon", "privacy"} & row.keys()
        assert told == []
        return
    expected = epsilon if epsilon is None else pytest.approx(epsilon, rel=1e-3)
    assert (row["epsilon"], row["delta"]) == (expected, 1e-5)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row.get("privacy") or {}).get("noise_multiplier") == then
    spoken = "\n".join(told)
    if then is not None:
        words = "epsilon unbounded" if epsilon is None else f"3 rounds spend epsilon {row['epsilon']:.4g}"
        assert words in spoken
    assert ("another privacy" in spoken) == (first != then)
    assert ("changed" in row) == (first != then)
    assert federation_line("round", {"rounds": 3, **row}).count("unbounded" if epsilon is None else "epsilon") >= 1


def test_another_seed_or_strategy_is_recorded_and_starts_anew(tmp_path: Path) -> None:
    federate(strategy("FedAdam"), toys(), rounds=2, save_round=lambda state: save_round(tmp_path, state))
    state = load_newest_round(tmp_path)
    assert state is not None
    assert state.strategy
    start = state.weights["w"].clone()
    told: list[str] = []
    reporter = SilentReporter()
    reporter.note = told.append  # type: ignore[method-assign]
    after = federate(strategy("FedAvgM", server_momentum=0.5), toys(), rounds=3, state=state, reporter=reporter)
    # FedAvgM's first step is the mean itself: nothing of Adam's moments is in it.
    assert (after.weights["w"] - start).tolist() == pytest.approx([1 / 8, 4 / 8, 20 / 8], abs=1e-5)
    old, new = after.history[-1]["changed"]["strategy"]
    assert (old["type"], new["type"], new["server_momentum"]) == ("FedAdam", "FedAvgM", 0.5)
    assert any("with another strategy" in note for note in told)
    assert [("changed" in row) for row in after.history] == [False, False, True]


def test_an_update_above_clipping_and_noise_is_refused_where_clients_see_to_privacy() -> None:
    settings = private(2.0, 1.0, at="client")
    honest = [ToyClient(f"c{n}", [1.0, 0.0, 0.0]) for n in range(3)]
    bound = largest_noisy_norm(settings, 3, 3)
    assert bound == pytest.approx(2.0 + 2.0 / math.sqrt(3) * (math.sqrt(3) + 8), rel=2e-3)
    state = federate(
        strategy("FedAvg"), [*honest, ToyClient("liar", [0, 2 * bound, 0])], privacy=settings, min_clients=3
    )
    assert "is more than clipping and noise leave" in state.history[0]["refused"]["liar"]
    # No honest one ever is.
    longest = max(
        float(protected({"a": torch.full((50,), 9.0)}, {"a": torch.zeros(50)}, 2.0, 1.5)["a"].norm())
        for _ in range(300)
    )
    assert longest < largest_noisy_norm(private(2.0, 1.5 * math.sqrt(2) / 2.0, at="client"), 2, 50)


def test_under_privacy_no_norm_is_bounded_by_other_sites() -> None:
    # Otherwise one site's update would show in how far others' are scaled down.
    clients = [*(ToyClient(f"c{n}", [0.01, 0.0, 0.0]) for n in range(4)), ToyClient("large", [0.0, 1.0, 0.0], 2**40)]
    state = federate(strategy("FedAvg"), clients, privacy=private(2.0))
    assert moved(state) == pytest.approx([0.008, 0.2, 0.0], abs=1e-6)
    assert state.history[0]["outliers"] == {"large": f"its {2**40} examples count as 10"}


def test_a_client_that_sees_to_privacy_clips_and_adds_its_share() -> None:
    received = {"a": torch.ones(100_000), "b": torch.zeros(3, 2)}
    trained = {"a": torch.ones(100_000), "b": torch.full((3, 2), 4.0)}
    sent = protected(trained, received, 2.0, 0.0)
    assert torch.equal(sent["a"], received["a"])
    assert float(sent["b"].norm()) == pytest.approx(2.0)
    deviation = noise_of_client(private(2.0, 3.0, at="client"), 4)
    assert deviation == 3.0
    noise = protected(trained, received, 2.0, deviation)["a"] - 1
    assert float(noise.std()) == pytest.approx(3.0, rel=0.02)
    # The quorum's noises together are the server's.
    assert math.sqrt(4) * deviation == 3.0 * 2.0


def test_updates_of_clients_that_add_noise_are_not_touched_again() -> None:
    weights = noisy(1.0, 1000, strategy("FedAvg"), at="client").weights["w"]
    # Toys send no noise, so any would be the server's.
    assert not weights.any()
    state = federate(strategy("FedAvg"), toys(), privacy=private(2.0, 1.0, at="client"))
    assert moved(state) == pytest.approx([1 / 3, 2 / 3, 4 / 3], abs=1e-6)


def test_a_task_sends_protected_weights_once_a_round(write_config: Callable[..., Path]) -> None:
    manager = make_manager(write_config, "retriever")
    plain = manager.get_federated_task(FederatedConfig(min_clients=1))
    start = plain.weights()
    trained = plain.fit(start, {"server-round": 1}).weights
    length = math.sqrt(sum(float((trained[name] - start[name]).square().sum()) for name in start))
    settings = FederatedConfig(min_clients=1, privacy=private(length / 4, at="client"))
    task = manager.get_federated_task(settings)

    def sent() -> dict[str, torch.Tensor]:
        content = RecordDict({"arrays": to_wire(start), "config": ConfigRecord({"server-round": 1})})
        return from_wire(ClientHandler(task)(asking(content)).content.array_records["arrays"])

    clipped = sent()
    for name, tensor in clipped.items():
        assert torch.allclose(tensor, start[name] + (trained[name] - start[name]) / 4, atol=1e-6)
    settings = FederatedConfig(min_clients=1, privacy=private(length, 0.1, at="client"))
    task = manager.get_federated_task(settings)
    first, second = sent(), sent()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.allclose(first[name], trained[name], atol=1e-6) for name in first)


def test_a_client_keeps_its_own_account_of_its_noise(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """It gives as many noisy updates as were agreed, each once and the same again, whoever is restarted in between."""
    manager = make_manager(write_config, "retriever", max_steps=1, epochs=1)
    settings = FederatedConfig(rounds=2, min_clients=4, privacy=private(0.5, 3.0, at="client"))
    folder = tmp_path / "work"
    start = manager.get_federated_task(settings).weights()
    moved_on = {name: tensor + 0.01 for name, tensor in start.items()}

    def restarted(rounds: int = 2) -> ClientHandler:
        client = ClientHandler(manager.get_federated_task(settings, folder))
        greeting = {"action": "handshake", "agreement": client.task.agreement.to_json(), "rounds": rounds}
        client(asking(RecordDict({"config": ConfigRecord(greeting)}), "query"))
        return client

    def ask(client: ClientHandler, number: int, weights: Any) -> dict[str, torch.Tensor]:
        content = RecordDict({"arrays": to_wire(weights), "config": ConfigRecord({"server-round": number})})
        return from_wire(client(asking(content)).content.array_records["arrays"])

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in start)

    client = restarted()
    first = ask(client, 1, start)
    assert same(ask(client, 1, start), first)
    assert same(ask(restarted(), 1, start), first)
    # Killed after the update was written, and before it was counted.
    (folder / "rounds.json").write_text(json.dumps({"agreed": 2, "newest": 1, "asked": "", "noises": []}))
    client = restarted()
    assert same(ask(client, 1, start), first)
    assert client.task.rounds.noises == [{"round": 1, "noise_multiplier": 1.5}]
    assert stat.S_IMODE((folder / "noisy.safetensors").stat().st_mode) == 0o600
    # Its own noise has 3 / sqrt(4) of the clipping norm, whatever the others add.
    assert client.task.rounds.spent() == {
        "own_epsilon": pytest.approx(spent_epsilon(1.5, 1, 1e-5)),
        "own_epsilon_replaced": pytest.approx(spent_epsilon(0.75, 1, 1e-5)),
        "delta": 1e-5,
    }
    with pytest.raises(ServerRefusedError, match="asks for round 1 again, but this client has trained round 1"):
        ask(client, 1, moved_on)
    second = ask(restarted(), 2, moved_on)
    assert same(ask(restarted(), 2, moved_on), second)
    with pytest.raises(ServerRefusedError, match="asks for round 3, but 2 rounds were agreed"):
        ask(restarted(), 3, start)
    # A server that begins anew asks for the same update, whose noise would be another one.
    client = restarted()
    with pytest.raises(ServerRefusedError, match=r"has given 2 noisy updates, as many as federated\.rounds"):
        ask(client, 1, start)
    assert client.ended
    assert client.task.rounds.spent()["own_epsilon"] == pytest.approx(spent_epsilon(1.5, 2, 1e-5))
    with pytest.raises(ServerRefusedError, match="wants 12 rounds now, but 2 were agreed"):
        restarted(12)


def test_other_noise_after_a_resume_is_counted_as_what_it_is(tmp_path: Path) -> None:
    update = FitResult({"w": torch.zeros(2)}, 1, {})

    def rounds(noise: float) -> ClientRounds:
        return ClientRounds(tmp_path, FederatedConfig(min_clients=1, privacy=private(1.0, noise, at="client")))

    for number, noise in enumerate((0.5, 0.5, 20.0), start=1):
        rounds(noise).give(f"{number}", number, update, noise)
    # mu is 2, 2 and 0.05.
    assert rounds(20.0).spent()["own_epsilon"] == pytest.approx(spent_epsilon(1 / math.sqrt(8.0025), 1, 1e-5))
    (tmp_path / "rounds.json").write_text("half")
    with pytest.raises(ModelError, match="record of this client's rounds"):
        rounds(1.0)


@pytest.mark.parametrize("kept", [True, False])
def test_rounds_are_trained_in_order_but_for_what_a_resume_repeats(tmp_path: Path, kept: bool) -> None:
    def restarted() -> ClientRounds:
        return ClientRounds(tmp_path if kept else None, FederatedConfig(rounds=3))

    rounds = restarted()
    # A server of Flower's own shakes no hands, and decides alone.
    for number in (7, 1, 1):
        rounds.begin(number, "weights")
    rounds = restarted()
    rounds.agree(5)
    for number in (1, 3, 3):
        rounds.begin(number, f"weights {number}")
    for number, asked in ((3, "others"), (2, "weights 2"), (0, "weights"), (6, "weights"), (-1, "weights")):
        with pytest.raises(ServerRefusedError):
            rounds.begin(number, asked)
    # The server keeps two rounds, and one that is resumed goes on at one of them.
    rounds.agree(4)
    with pytest.raises(ServerRefusedError):
        rounds.begin(1, "weights 1")
    rounds.begin(2, "others")
    rounds.begin(5, "weights")
    with pytest.raises(ServerRefusedError, match="wants 6 rounds now, but 5 were agreed"):
        rounds.agree(6)
    if kept:
        again = restarted()
        again.begin(5, "weights")
        with pytest.raises(ServerRefusedError):
            again.begin(5, "others")
        with pytest.raises(ServerRefusedError):
            again.begin(6, "weights")
    for nonsense in (0, -1, True, "12", None, [9]):
        unnamed = ClientRounds(None, FederatedConfig(rounds=3))
        unnamed.agree(nonsense)
        unnamed.begin(3, "weights")
        with pytest.raises(ServerRefusedError, match="asks for round 4, but 3 rounds were agreed"):
            unnamed.begin(4, "weights")


def test_who_wants_other_privacy_is_refused(write_config: Callable[..., Path]) -> None:
    manager = make_manager(write_config, "retriever")

    def agreement(privacy: PrivacyConfig | None, clients: int = 2) -> Any:
        return manager.get_federated_task(FederatedConfig(privacy=privacy, min_clients=clients)).agreement

    words = "federated.privacy.noise_multiplier is 1.0, but the server has 0.5"
    assert differences(agreement(private(1.0, 0.5)), agreement(private(1.0, 1.0))) == [words]
    (first, *_) = differences(agreement(None), agreement(private(1.0, 1.0)))
    assert first == 'federated.privacy.at is "server", but the server has not set'
    # The share of the noise follows from the quorum.
    shares = [agreement(private(1.0, 1.0, at="client"), clients) for clients in (2, 3)]
    assert differences(*shares) == ["federated.min_clients is 3, but the server has 2"]
    assert not differences(*[agreement(private(1.0, 1.0), clients) for clients in (2, 3)])
    # What a client spends follows from the number of rounds.
    noisy_client = private(1.0, 1.0, at="client")
    more = manager.get_federated_task(FederatedConfig(privacy=noisy_client, rounds=12)).agreement
    assert differences(more, agreement(noisy_client)) == ["federated.rounds is 3, but the server has 12"]


def test_strategies_that_look_at_single_updates_are_refused(write_config: Callable[..., Path]) -> None:
    section = {"privacy": {"clipping_norm": 1.0, "noise_multiplier": 1.0}, "strategy": {"type": "FedMedian"}}
    path = write_config(federated=section)
    with pytest.raises(InvalidConfigError, match="which FedMedian does not take"):
        load_config(path)
    assert load_config(path, ["federated.strategy.type=FedYogi"]).federated
    task = make_manager(write_config, "retriever").get_federated_task(FederatedConfig(privacy=private(1.0)))
    with pytest.raises(FederationError, match="which FedMedian does not take"):
        ScreenedStrategy(FedMedian(), task)
    with pytest.raises(ConfigError, match="classic API sends weights as they are"):
        task.client(task.trainer.rag_system.retriever.query_encoder, None)


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_the_message_api_clips_weighs_and_tells(write_config: Callable[..., Path], kind: Any) -> None:
    manager = make_manager(write_config, "retriever")
    settings = FederatedConfig(min_clients=2, privacy=private(2.0, SILENT if kind is FedAvg else 1000.0))
    task = manager.get_federated_task(settings)
    start = task.weights()
    name = min(start, key=lambda name: start[name].numel())
    app = ScreenedStrategy(kind(), task)
    record = to_wire(start)
    app._reference = record
    if kind is FedAdam:
        app.strategy.current_arrays = {key: array.numpy() for key, array in record.items()}  # type: ignore[attr-defined]

    def reply(length: float, examples: int) -> Message:
        changed = {key: tensor.clone() for key, tensor in start.items()}
        changed[name].view(-1)[0] += length
        metrics = MetricRecord({"num-examples": examples, "loss": 1.0})
        return Message(
            RecordDict({"arrays": to_wire(changed), "metrics": metrics}), reply_to=asking(RecordDict(), node=examples)
        )

    arrays, metrics = app.aggregate_train(1, [reply(1.0, 1), reply(8.0, 99)])
    assert isinstance(arrays, ArrayRecord)
    assert metrics is not None
    assert metrics["epsilon"] == spent_epsilon(settings.privacy.noise_multiplier, 1, 1e-5)  # type: ignore[union-attr]
    difference = from_wire(arrays)[name].view(-1) - start[name].view(-1)
    if kind is FedAvg:
        assert float(difference[0]) == pytest.approx((1.0 + 2.0) / 2, abs=1e-5)
        assert float(difference[1:].abs().max()) < 1e-6
    else:
        assert 0 < float(difference.abs().max()) < 1.1
