"""Servers of Flower's two APIs around tiny models, in one process: what they tell clients and whom they aggregate."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_retriever
from fl_tasks import SECTIONS, largest_difference
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client import Client
from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, parameters_to_ndarrays
from flwr.server import Server
from flwr.server.client_proxy import ClientProxy
from flwr.server.history import History
from flwr.server.strategy import FedAvg, FedProx, Strategy
from flwr.serverapp.strategy import FedAvg as MessageFedAvg
from toy_federation import asking

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConnectionFailedError, DataError, FederationError
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.flower_api import ScreenedStrategy
from fedrag_cli.federated.grid import InProcessGrid
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights, from_wire, to_wire
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainer_managers.build import build_manager

ONE = FederatedConfig(min_clients=1)


class Notes(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Proxy(ClientProxy):
    """A client of the classic API without a network."""

    def __init__(self, cid: str, client: Client) -> None:
        super().__init__(cid)
        self.client = client
        self.asked: list[FitIns] = []
        self.results: list[FitRes] = []

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        self.asked.append(ins)
        self.results.append(self.client.fit(ins))
        return self.results[-1]

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        return self.client.evaluate(ins)

    def get_properties(self, *_: Any) -> Any:
        raise NotImplementedError

    def get_parameters(self, *_: Any) -> Any:
        raise NotImplementedError

    def reconnect(self, *_: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def task_of(write_config: Callable[..., Path], models: dict[str, Path]) -> Callable[..., FLTask]:
    """Return a function that gives a site's task."""

    def make(
        site: str = "server",
        settings: FederatedConfig = ONE,
        model: Path | None = None,
        reporter: Notes | None = None,
        **options: Any,
    ) -> FLTask:
        trainer = {**SECTIONS["retriever"], "retriever": {**SECTIONS["retriever"]["retriever"], **options}}
        section = {
            "retriever": {"model": str(model or models["retriever"])},
            "generator": {"model": str(models["generator"]), "max_new_tokens": 4},
        }
        config = load_config(write_config(site, trainer=trainer, rag_system=section))
        data = load_run_data(config)
        rag_system = build_rag_system(config, nodes=data.nodes)
        manager = build_manager(
            config, rag_system, train=data.train, validation=data.validation, reporter=reporter or Notes()
        )
        task: FLTask = manager.get_federated_task(settings)
        return task

    return make


def encoder(task: FLTask) -> Any:
    return task.trainer.rag_system.retriever.query_encoder


def run_classic(server: Server, clients: dict[str, Client], rounds: int = 1) -> tuple[History, dict[str, Proxy]]:
    proxies = {name: Proxy(name, client) for name, client in clients.items()}
    for proxy in proxies.values():
        server.client_manager().register(proxy)
    return server.fit(rounds, None)[0], proxies


def classic_client(task: FLTask, *, validates: bool = True, examples: int = 14) -> Client:
    trainer = task.trainer
    return task.client(
        copy.deepcopy(encoder(task)),
        trainer.train_examples[:examples],
        trainer.validation_examples if validates else None,
    )


def plain(kind: type[Strategy] = FedAvg, clients: int = 1, **options: Any) -> Any:
    return kind(min_fit_clients=clients, min_evaluate_clients=clients, min_available_clients=clients, **options)  # type: ignore[call-arg]


def sent(proxy: Proxy, task: FLTask, number: int = 0) -> Weights:
    return named(proxy.results[number].parameters, task)


def named(parameters: Parameters, task: FLTask) -> Weights:
    arrays = parameters_to_ndarrays(parameters)
    return {name: torch.from_numpy(array.copy()) for name, array in zip(sorted(task.weights()), arrays, strict=True)}


def test_fedprox_of_the_classic_api_holds_the_clients_back(task_of: Callable[..., FLTask]) -> None:
    task, site = task_of(), task_of("site")
    start = task.weights()
    client = classic_client(site)
    _, proxies = run_classic(task.server(encoder(task), plain(FedProx, proximal_mu=50.0)), {"a": client})
    assert proxies["a"].asked[0].config["proximal_mu"] == 50.0
    expected = task_of("site").fit(start, {"server-round": 1, "proximal-mu": 50.0}).weights
    assert largest_difference(sent(proxies["a"], task), expected) <= 1e-6
    assert largest_difference(expected, task_of("site").fit(start, {"server-round": 1}).weights) > 1e-5


def test_every_classic_round_draws_its_own_order(task_of: Callable[..., FLTask]) -> None:
    task, site = task_of(), task_of("site")
    start = task.weights()
    _, proxies = run_classic(task.server(encoder(task), plain()), {"a": classic_client(site)}, rounds=2)
    assert [asked.config["server-round"] for asked in proxies["a"].asked] == [1, 2]
    assert largest_difference(sent(proxies["a"], task), start) > 1e-4
    first, second = (asked.parameters for asked in proxies["a"].asked)

    def fitted(number: int) -> Weights:
        alone = task_of("site")
        alone.fit(named(first, task), {"server-round": 1})
        return alone.fit(named(second, task), {"server-round": number}).weights

    expected = fitted(2)
    assert largest_difference(sent(proxies["a"], task, 1), expected) <= 1e-6
    assert largest_difference(fitted(1), expected) > 1e-4
    # With a server that says nothing of rounds, the client counts.
    client = classic_client(task_of("site"))
    client.fit(FitIns(first, {}))
    assert largest_difference(named(client.fit(FitIns(second, {})).parameters, task), expected) <= 1e-6


def test_classic_clients_report_the_listed_metrics_of_their_own_data(task_of: Callable[..., FLTask]) -> None:
    listed = FederatedConfig(min_clients=1, metrics=("loss", "validation_loss", "mrr"))
    task, site = task_of(settings=listed), task_of("site", listed)
    held_out = site.trainer.validation_examples
    own = site.around(copy.deepcopy(encoder(site)), site.trainer.train_examples, held_out[:2])
    scores = [site.around(None, [], [example]).evaluate(site.weights()).metrics["mrr"] for example in held_out[:2]]
    assert own.evaluate(site.weights()).metrics["mrr"] == pytest.approx(sum(scores) / 2)
    history, _ = run_classic(task.server(encoder(task)), {"a": classic_client(site)})
    ((_, value),) = history.metrics_distributed["mrr"]
    assert value == pytest.approx(task.evaluate(task.weights()).metrics["mrr"])
    with pytest.raises(DataError, match="needs relevant ids"):
        site.around(None, held_out, [dataclasses.replace(held_out[0], relevant_ids=())])


def test_a_users_own_strategy_goes_without_validation_examples(task_of: Callable[..., FLTask]) -> None:
    task, site, other = task_of(), task_of("site"), task_of("other")
    clients = {name: classic_client(one, validates=False) for name, one in (("a", site), ("b", other))}
    history, _ = run_classic(task.server(encoder(task), plain(clients=2)), clients)
    assert history.losses_distributed == []
    # One that has some is the whole mean.
    task = task_of()
    clients = {"a": classic_client(task_of("site"), validates=False), "b": classic_client(task_of("other"))}
    history, _ = run_classic(task.server(encoder(task), plain(clients=2)), clients)
    ((_, loss),) = history.losses_distributed
    assert loss == pytest.approx(task.evaluate(task.weights()).metrics["validation_loss"], rel=1e-4)


@pytest.fixture
def strangers(task_of: Callable[..., FLTask], tmp_path: Path) -> dict[str, FLTask]:
    """Return sites that tune tensors of the same names and shapes, but do not fit."""
    return {
        "model": task_of("stranger", model=make_retriever(tmp_path / "another", seed=7)),
        "settings": task_of("hasty", learning_rate=5e-3),
    }


WORDS = {
    "model": "another passage encoder model; another query encoder model",
    "settings": "trainer.retriever.learning_rate is 0.005, but the server has 0.001",
}


@pytest.mark.parametrize("kind", ["model", "settings"])
@pytest.mark.parametrize("own_strategy", [False, True])
def test_the_classic_server_aggregates_no_client_that_does_not_fit(
    task_of: Callable[..., FLTask], strangers: dict[str, FLTask], kind: str, own_strategy: bool
) -> None:
    notes = Notes()
    task, site = task_of(settings=FederatedConfig(min_clients=2), reporter=notes), task_of("site")
    assert strangers[kind].agreement.manifest == task.agreement.manifest
    clients = {"a": classic_client(site), "b": classic_client(strangers[kind])}
    model = encoder(task)
    _, proxies = run_classic(task.server(model, plain(clients=2) if own_strategy else None), clients)
    assert proxies["b"].results == []
    assert largest_difference(task.weights(), sent(proxies["a"], task)) == 0
    assert any(WORDS[kind] in note for note in notes.notes)
    with pytest.raises(FederationError, match="Round 1 has no usable update; a client failed: This client does not"):
        run_classic(task_of().server(encoder(task), plain()), {"b": classic_client(strangers[kind])})


@pytest.mark.parametrize("kind", ["model", "settings"])
def test_the_message_api_aggregates_no_client_that_does_not_fit(
    task_of: Callable[..., FLTask], strangers: dict[str, FLTask], kind: str
) -> None:
    notes, told = Notes(), Notes()
    task, site = task_of(reporter=notes), task_of("site")
    start = task.weights()
    expected = task_of("site").fit(start, {"server-round": 1}).weights
    grid = InProcessGrid({"a": ClientHandler(site), "b": ClientHandler(strangers[kind])}, told)
    result = ScreenedStrategy(MessageFedAvg(fraction_evaluate=1.0), task).start(
        grid=grid, initial_arrays=to_wire(start), num_rounds=1
    )
    assert largest_difference(from_wire(result.arrays), expected) <= 1e-6
    assert "Round 1: update of 3 refused: it failed; its own messages say why" in notes.notes
    # Neither its training nor its measurement counts.
    assert [WORDS[kind] in note for note in told.notes] == [True, True]
    assert isinstance(result.evaluate_metrics_clientapp[1], MetricRecord)
    grid = InProcessGrid({"b": ClientHandler(strangers[kind])}, told)
    alone = ScreenedStrategy(MessageFedAvg(min_train_nodes=1, min_available_nodes=1), task)
    messages = list(alone.configure_train(1, to_wire(start), ConfigRecord(), grid))
    with pytest.raises(ConnectionFailedError, match="does not fit the federation"):
        ClientHandler(strangers[kind])(messages[0])
    with pytest.raises(FederationError, match=r"Round 1 has 0 usable updates, but needs 1; 2: it failed"):
        alone.aggregate_train(1, grid.send_and_receive(messages))


def test_the_message_api_sums_in_one_order_whoever_answers_first(task_of: Callable[..., FLTask]) -> None:
    task = task_of()
    start = task.weights()
    asking(RecordDict())

    def replies() -> list[Message]:
        found = []
        for node, (size, examples) in enumerate([(1e4, 3), (1e-3, 1), (-1e4, 7), (0.3, 11)], start=2):
            weights = {name: tensor + size * (1 + tensor.abs()) for name, tensor in start.items()}
            metrics = MetricRecord({"num-examples": examples, "loss": 1 / examples})
            content = RecordDict({"arrays": to_wire(weights), "metrics": metrics})
            found.append(Message(content, reply_to=Message(RecordDict(), node, "train")))
        return found

    def summed(order: Sequence[int]) -> Weights:
        app = ScreenedStrategy(MessageFedAvg(), task)
        app._reference = to_wire(start)
        arrays, _ = app.aggregate_train(1, [replies()[number] for number in order])
        assert arrays is not None
        return from_wire(arrays)

    first = summed([0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        assert largest_difference(summed(order), first) == 0
