"""The federated task around real (tiny) models: its work equals training, and uses its own data, model and options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fl_tasks import NEVER, SECTIONS, largest_difference, make_manager, make_task
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from toy_federation import asking

from fedrag_cli.commands.federation import run_federation
from fedrag_cli.commands.job import Job
from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config, load_config_with_source
from fedrag_cli.config.schema import FederatedConfig, FusionConfig
from fedrag_cli.errors import (
    ConfigError,
    ConnectionFailedError,
    DataError,
    FederationError,
    KnowledgeStoreError,
    ModelError,
    ServerRefusedError,
)
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.flower_api import ScreenedStrategy
from fedrag_cli.federated.grid import InProcessGrid
from fedrag_cli.federated.handshake import Agreement, agreement_of, differences
from fedrag_cli.federated.weights import Weights, from_wire, to_wire
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.config import BM25Config
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainer_managers.build import build_manager


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_one_round_equals_training(write_config: Callable[..., Path], side: str) -> None:
    manager = make_manager(write_config, side)
    manager.train()
    trained = manager.trainers[side].trained_weights()
    task = make_task(write_config, side)
    start = task.weights()
    result = task.fit(start, {"server-round": 1})
    assert largest_difference(result.weights, trained) <= 1e-6
    assert largest_difference(result.weights, start) > 1e-4
    assert (result.examples, result.metrics["steps"]) == (
        14,
        len(task.trainer.train_examples) // 4 + 1 if side == "retriever" else 7,
    )


@pytest.mark.parametrize(("side", "objective"), [("retriever", "contrastive"), ("generator", "raft")])
def test_one_round_of_an_objective_that_needs_relevant_ids_equals_training(
    write_config: Callable[..., Path], side: str, objective: str
) -> None:
    settings = {"type": objective, "batch_size": 4, "learning_rate": 1e-3, "epochs": 1, "validation": NEVER}

    def manager(folder: str) -> Any:
        config = load_config(write_config(folder, trainer={"mode": side, side: settings}))
        data = load_run_data(config)
        rag_system = build_rag_system(config, nodes=data.nodes, with_generator=side == "generator")
        return build_manager(config, rag_system, train=data.train, validation=data.validation)

    alone = manager("alone")
    alone.train()
    task = manager("federated").get_federated_task()
    start = task.weights()
    assert ("generator" in task.agreement.models) == (side == "generator")
    assert any(name.startswith("rag_system.prompt") for name in task.agreement.settings) == (side == "generator")
    result = task.fit(start, {"server-round": 1})
    assert largest_difference(result.weights, alone.trainers[side].trained_weights()) <= 1e-6
    assert largest_difference(result.weights, start) > 1e-5
    assert task.evaluate(result.weights).metrics["validation_loss"] != task.evaluate(start).metrics["validation_loss"]
    assert result.examples == 14


def test_every_round_draws_its_own_order(write_config: Callable[..., Path]) -> None:
    task = make_task(write_config)
    start = task.weights()
    first = task.fit(start, {"server-round": 1}).weights
    second = task.fit(start, {"server-round": 2}).weights
    assert largest_difference(first, second) > 0
    again = make_task(write_config).fit(start, {"server-round": 2}).weights
    # Likelihoods that were scored in another company of prompts differ in the last bits.
    assert largest_difference(again, second) < 1e-6


def test_two_clients_train_on_their_own_data_and_report_its_loss(write_config: Callable[..., Path]) -> None:
    task = make_task(write_config)
    examples = task.trainer.train_examples
    clients = [task.around(None, part, part) for part in (examples[:5], examples[5:])]
    start = task.weights()
    # The loss of the untouched weights on each client's own examples.
    own = [client.evaluate(start).metrics["validation_loss"] for client in clients]
    assert own[0] != own[1]
    results = [client.fit(start, {"server-round": 1}) for client in clients]
    assert [result.examples for result in results] == [5, 9]
    assert largest_difference(results[0].weights, results[1].weights) > 1e-5
    assert results[0].metrics["loss"] != results[1].metrics["loss"]
    assert task.evaluate(start).examples == 4
    for client, loss in zip(clients, own, strict=True):
        assert client.evaluate(start).metrics["validation_loss"] == pytest.approx(loss, abs=1e-6)


def test_a_round_that_was_computed_is_not_computed_again(write_config: Callable[..., Path]) -> None:
    task = make_task(write_config)
    start = task.weights()
    first = task.fit(start, {"server-round": 1})
    assert task.fit(start, {"server-round": 1}) is first
    assert task.fit(start, {"server-round": 1, "proximal-mu": 0.1}) is not first


def test_the_proximal_term_keeps_a_client_near_the_global_weights(write_config: Callable[..., Path]) -> None:
    def moved(mu: float) -> float:
        task = make_task(write_config, optimizer="sgd", learning_rate=0.05, epochs=3, max_grad_norm=0.0)
        start = task.weights()
        trained = task.fit(start, {"server-round": 1, "proximal-mu": mu}).weights
        return sum(float((trained[name] - start[name]).square().sum()) for name in start) ** 0.5

    free, held = moved(0.0), moved(5.0)
    assert 0 < held < 0.8 * free


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_the_reported_loss_is_that_of_the_objective(write_config: Callable[..., Path], side: str) -> None:
    """One step from the global weights, one more from where it led: the penalty is 0 in the first and large after."""
    options: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "warmup": 0}
    batch = 7 if side == "retriever" else 14
    task = make_task(write_config, side, **options, batch_size=batch, gradient_accumulation_steps=2, epochs=2)
    logged: list[float] = []
    task.trainer.reporter.event = lambda name, **fields: name == "train_step" and logged.append(fields["loss"])  # type: ignore
    start = task.weights()
    mu = 20.0
    held = task.fit(start, {"server-round": 1, "proximal-mu": mu})
    assert held.metrics["steps"] == 2

    def objective(weights: Weights) -> float:
        alone = make_task(write_config, side, **options, batch_size=28, epochs=1)
        loss: float = alone.fit(weights, {"server-round": 1}).metrics["loss"]
        return loss

    after_one = (
        make_task(write_config, side, **options, batch_size=28, epochs=1).fit(start, {"server-round": 1}).weights
    )
    steps = [objective(start), objective(after_one)]
    expected = sum(steps) / 2
    penalty = mu / 2 * sum(float((after_one[name] - start[name]).square().sum()) for name in start)
    assert penalty / 2 > 1e-3
    assert held.metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert logged == pytest.approx(steps, abs=1e-5)
    # It is minimised all the same: the second step pulls back.
    free = make_task(write_config, side, **options, batch_size=28, epochs=2).fit(start, {"server-round": 1}).weights
    assert largest_difference(held.weights, start) < largest_difference(free, start)


def test_likelihoods_are_computed_once_for_all_rounds(write_config: Callable[..., Path], tmp_path: Path) -> None:
    # Steps too small to change which passages are found.
    manager = make_manager(write_config, "retriever", learning_rate=1e-6)
    task = manager.get_federated_task(work_directory=tmp_path / "work")
    start = task.weights()
    task.evaluate(start)
    task.fit(start, {"server-round": 1})
    (cache,) = (tmp_path / "work" / "cache").glob("*.jsonl")
    scored = cache.read_text(encoding="utf-8")
    task.fit(start, {"server-round": 2})
    assert cache.read_text(encoding="utf-8") == scored
    assert not list((tmp_path / "work").glob("round-*"))


def test_weights_that_do_not_fit_are_an_error(write_config: Callable[..., Path]) -> None:
    task = make_task(write_config)
    start = task.weights()
    name = next(iter(start))
    with pytest.raises(ModelError, match="is missing"):
        task.fit({key: value for key, value in start.items() if key != name}, {})
    with pytest.raises(ModelError, match="has the shape"):
        task.evaluate({**start, name: torch.zeros(1)})
    with pytest.raises(DataError, match="no training examples"):
        task.around(None).fit(start, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_global_model_that_is_not_finite_is_never_taken(write_config: Callable[..., Path], value: float) -> None:
    task = make_task(write_config, max_steps=1)
    task.trainer.validation_examples = []
    sound = task.weights()
    spoilt = {name: tensor.clone() for name, tensor in sound.items()}
    list(spoilt.values())[-1].view(-1)[-1] = value
    for act in (task.load, task.evaluate, lambda weights: task.fit(weights, {"server-round": 1})):
        with pytest.raises(ServerRefusedError, match=r"not finite, in \S+; the model here stays as it was"):
            act(spoilt)
    kept: list[Any] = []
    client = ClientHandler(task, on_final=kept.append)
    config = ConfigRecord({"final": True, "server-round": 2})
    with pytest.raises(ServerRefusedError):
        client(asking(RecordDict({"arrays": to_wire(spoilt), "config": config}), "evaluate"))
    assert (kept, client.ended, client.finished) == ([], True, False)
    assert largest_difference(task.weights(), sound) == 0.0


def test_a_global_model_of_other_tensors_is_never_taken(write_config: Callable[..., Path]) -> None:
    task = make_task(write_config)
    whole = to_wire(task.weights())
    name = next(iter(whole))
    array, rest = whole[name], {key: value for key, value in whole.items() if key != name}
    wrong = {
        "missing": rest,
        "more": {**whole, "another": array},
        "shape": {**rest, name: Array(array.dtype, (10**9, 10**9), array.stype, array.data)},
        "dtype": {**rest, name: Array("float64", array.shape, array.stype, array.data)},
        "bytes": {**rest, name: Array(array.dtype, array.shape, array.stype, array.data[:-4])},
        "no bytes": {**rest, name: Array(array.dtype, array.shape, array.stype, b"")},
    }
    for arrays in wrong.values():
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({"server-round": 1})})
        for kind in ("train", "evaluate"):
            client = ClientHandler(task)
            with pytest.raises(ServerRefusedError, match="The server's model"):
                client(asking(content, kind))
            assert client.ended


def test_alternating_is_refused_in_words(write_config: Callable[..., Path]) -> None:
    config = load_config(write_config(trainer={"mode": "alternating"}))
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes)
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation)
    with pytest.raises(ConfigError, match="A federation tunes one side"):
        manager.get_federated_task()
    manager.mode = "generator"
    assert manager.get_federated_task().side == "generator"


def test_clients_report_the_metrics_of_the_settings(write_config: Callable[..., Path]) -> None:
    manager = make_manager(write_config, "retriever")
    task = manager.get_federated_task(FederatedConfig(metrics=("loss", "validation_loss", "mrr")))
    measured = task.evaluate(task.weights())
    assert set(measured.metrics) == {"validation_loss", "mrr"}
    assert 0 < measured.metrics["mrr"] <= 1


def test_the_classic_client_trains_the_model_and_the_data_it_was_given(write_config: Callable[..., Path]) -> None:
    from flwr.common import Code, EvaluateIns, FitIns, ndarrays_to_parameters, parameters_to_ndarrays

    task = make_task(write_config)
    examples = task.trainer.train_examples
    import copy

    model = copy.deepcopy(task.trainer.rag_system.retriever.query_encoder)
    rows = {"query": [e.query for e in examples[:5]], "response": [e.response for e in examples[:5]]}
    client = task.client(model, Dataset.from_dict(rows), Dataset.from_dict(rows))
    server = task.server(task.trainer.rag_system.retriever.query_encoder)
    parameters = server.strategy.initialize_parameters(None)  # type: ignore[arg-type]
    assert parameters is not None
    config = {"server-round": 1, "agreement": task.agreement.to_json()}
    answer = client.fit(FitIns(parameters, dict(config)))
    assert (answer.status.code, answer.num_examples) == (Code.OK, 5)
    # The model that was handed over is the one that moved; the task's own did not.
    moved = dict(model.named_parameters())
    theirs = dict(task.trainer.rag_system.retriever.query_encoder.named_parameters())
    assert any(not torch.equal(moved[name], theirs[name]) for name in moved)
    expected = task.around(None, examples[:5]).fit(task.weights(), {"server-round": 1}).weights
    names = sorted(expected)
    for name, array in zip(names, parameters_to_ndarrays(answer.parameters), strict=True):
        assert torch.allclose(torch.from_numpy(array.copy()), expected[name], atol=1e-6), name
    measured = client.evaluate(EvaluateIns(parameters, dict(config)))
    assert measured.num_examples == 5
    assert measured.loss == pytest.approx(measured.metrics["validation_loss"])
    other = dataclasses.replace(task.agreement, manifest={"w": [1]})
    with pytest.raises(ConnectionFailedError, match="but on the server missing"):
        client.fit(FitIns(parameters, {"agreement": other.to_json()}))
    with pytest.raises(FederationError, match="tensors came over the classic API"):
        client.fit(FitIns(ndarrays_to_parameters(parameters_to_ndarrays(parameters)[:-1]), {}))


def test_both_encoders_and_another_generator_model(write_config: Callable[..., Path], models: dict[str, Path]) -> None:
    import copy

    both = make_task(write_config, train="both")
    model = copy.deepcopy(both.trainer.rag_system.retriever.query_encoder)
    own = both.around(model, both.trainer.train_examples)
    start = own.weights()
    assert largest_difference(own.fit(start, {"server-round": 1}).weights, start) > 1e-5
    assert own.trainer.rag_system.retriever.is_shared
    # The trained weights leave; what is searched with comes with the next message.
    with pytest.raises(KnowledgeStoreError, match="filled by another encoder"):
        own.trainer.rag_system.require_matching_store()
    own.evaluate(own.weights())
    own.trainer.rag_system.require_matching_store()
    both.trainer.rag_system.require_matching_store()
    generator = make_task(write_config, "generator")
    with pytest.raises(ModelError, match="is a SentenceTransformer, not a LlamaForCausalLM"):
        both.around(generator.trainer.rag_system.require_generator().model.base_model.model)


def test_sites_that_fuse_words_otherwise_refuse_each_other(write_config: Callable[..., Path]) -> None:
    trainer = make_task(write_config).trainer
    config = trainer.rag_system.config
    assert config is not None

    def agreement(**changes: Any) -> Agreement:
        changed = dataclasses.replace(config.rag_system, **changes)
        trainer.rag_system.config = dataclasses.replace(config, rag_system=changed)
        return agreement_of(trainer, FederatedConfig())

    dense, hybrid = agreement(), agreement(lexical=BM25Config())
    assert 'rag_system.lexical.type is "bm25", but the server has not set' in differences(dense, hybrid)
    other = agreement(lexical=BM25Config(), fusion=FusionConfig(weight=0.5))
    assert differences(hybrid, other) == ["rag_system.fusion.weight is 0.5, but the server has 0.7"]
    # Each site's passages have their own language.
    german = agreement(lexical=BM25Config(language="german", stemming=True))
    assert not differences(hybrid, german)


HALF = FederatedConfig(transport_dtype="float16", min_clients=1)


def test_sites_that_send_other_number_formats_refuse_each_other(write_config: Callable[..., Path]) -> None:
    manager = make_manager(write_config, "retriever")
    plain, half = manager.get_federated_task(), manager.get_federated_task(HALF)
    words = 'federated.transport_dtype is "float16", but the server has "float32"'
    assert differences(plain.agreement, half.agreement) == [words]
    client = ClientHandler(half)
    hello = ConfigRecord({"action": "handshake", "agreement": plain.agreement.to_json()})
    client(asking(RecordDict({"config": hello}), "query"))
    assert isinstance(client.failure, ConnectionFailedError)
    assert words in client.failure.message


def test_a_client_trains_from_float16_and_sends_float16(write_config: Callable[..., Path]) -> None:
    task = make_manager(write_config, "retriever").get_federated_task(HALF)
    start = task.weights()
    arrays = to_wire(start, "float16")
    message = asking(RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})}))
    reply = ClientHandler(task)(message)
    trained = task.fit({name: tensor.half().float() for name, tensor in start.items()}, {"server-round": 1}).weights
    sent = reply.content.array_records["arrays"]
    assert {array.dtype for array in sent.values()} == {"float16"}
    changes = {name: (trained[name] - start[name].half().float()).half().float() for name in trained}
    assert all(torch.equal(tensor, changes[name]) for name, tensor in from_wire(sent).items())
    assert any(bool(change.any()) for change in changes.values())


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_lent_weights_are_in_memory_once_and_come_back(write_config: Callable[..., Path], side: str) -> None:
    task = make_task(write_config, side)
    before, agreement = task.weights(), task.agreement
    lent = task.lend()
    assert largest_difference(lent, before) == 0
    parameters = {name: item for name, item in task.trainer.model.named_parameters() if item.requires_grad}
    assert set(parameters) == set(lent)
    assert all(parameter.numel() == 0 for parameter in parameters.values())
    task.load(lent)
    assert all(parameter.data_ptr() == lent[name].data_ptr() for name, parameter in parameters.items())
    assert largest_difference(task.weights(), before) == 0
    task.release()
    changed = {name: tensor + 1 for name, tensor in before.items()}
    task.load(changed)
    assert largest_difference(task.weights(), changed) == 0
    assert agreement_of(task.trainer, task.settings).manifest == agreement.manifest
    task.release()
    with pytest.raises(ModelError, match="is missing"):
        task.load({})


def test_a_server_that_evaluates_between_rounds_has_its_weights_once(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    def outcome(*, shares_model: bool) -> tuple[Weights, dict[str, Any]]:
        path = write_config(trainer=SECTIONS["retriever"], federated={"rounds": 2, "min_clients": 1})
        source = load_config_with_source(path)
        config = source.config
        assert config.federated is not None
        data = load_run_data(config)
        systems = [build_rag_system(config, nodes=data.nodes) for _ in range(2)]
        server, client = (
            build_manager(config, system, train=data.train, validation=data.validation).get_federated_task()
            for system in systems
        )
        grid = InProcessGrid({"a": ClientHandler(client, "a")})
        run = RunDirectory.create(str(tmp_path / "runs"), "server", "", command=[], seed=1)
        job = Job(run, source, SilentReporter(), is_new=True)
        state = run_federation(job, data, grid, server, systems[0], config.federated, shares_model=shares_model)
        assert state.weights == {}
        # The client ends with what the server has.
        assert largest_difference(server.weights(), client.weights()) == 0
        return server.weights(), state.evaluations

    weights, evaluations = outcome(shares_model=False)
    kept, plain = outcome(shares_model=True)
    assert largest_difference(weights, kept) == 0
    assert set(evaluations) == {"0", "1", "2"}
    assert evaluations == plain
    assert all("mrr" in found["server"]["metrics"] for found in evaluations.values())


def test_the_message_api_rounds_what_it_sends_and_aggregates_float32(write_config: Callable[..., Path]) -> None:
    task = make_manager(write_config, "retriever").get_federated_task(HALF)
    seen: list[ArrayRecord] = []

    asking(RecordDict())  # Flower notes who sends.

    class Grid:
        def get_node_ids(self) -> list[int]:
            return [1, 2]

    from flwr.serverapp.strategy import FedAvg

    strategy = ScreenedStrategy(FedAvg(fraction_evaluate=1.0), task)
    start = {name: tensor + 1e-5 for name, tensor in task.weights().items()}
    for messages in (
        strategy.configure_train(1, to_wire(start), ConfigRecord(), Grid()),  # type: ignore[arg-type]
        strategy.configure_evaluate(1, to_wire(start), ConfigRecord(), Grid()),  # type: ignore[arg-type]
    ):
        asked = list(messages)
        seen += [message.content.array_records["arrays"] for message in asked]
    assert all(torch.equal(from_wire(record)[name], start[name].half().float()) for record in seen for name in start)
    asked = list(strategy.configure_train(1, to_wire(start), ConfigRecord(), Grid()))  # type: ignore[arg-type]
    replies, values = [], []
    for message, step in zip(asked, (0.125, 0.0625), strict=True):
        values.append({name: torch.full_like(tensor, step) for name, tensor in start.items()})
        metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
        content = RecordDict({"arrays": to_wire(values[-1], "float16"), "metrics": metrics})
        reply = Message(content, reply_to=message)
        replies.append(reply)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    for name, tensor in from_wire(arrays).items():
        assert arrays[name].dtype == "float32"
        assert torch.allclose(tensor, start[name] + 0.09375, rtol=0, atol=1e-6)


def test_the_classic_api_refuses_float16(write_config: Callable[..., Path]) -> None:
    task = make_manager(write_config, "retriever").get_federated_task(HALF)
    model = task.trainer.rag_system.retriever.query_encoder
    for make in (lambda: task.server(model), lambda: task.client(model, [])):
        with pytest.raises(ConfigError, match="classic API sends weights as float32, not float16"):
            make()


def test_client_app_and_server_app_are_flowers(write_config: Callable[..., Path]) -> None:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    task = make_task(write_config)
    assert isinstance(task.client_app(), ClientApp)
    assert isinstance(task.server_app(), ServerApp)
