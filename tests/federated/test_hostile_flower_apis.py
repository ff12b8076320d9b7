"""What hostile clients send to servers of Flower's two own APIs: refused by name, or held down."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.common import Code, EvaluateRes, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg as ClassicFedAvg
from flwr.serverapp.strategy import FedAvg
from toy_federation import Recorder, asking, common

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import FederationError
from fedrag_cli.federated.flower_api import AgreedStrategy, ScreenedStrategy
from fedrag_cli.federated.weights import to_wire

HOSTILE = "\x1b[2J\x1b]0;x\x07\n| \x9b31m\u202e\u200b\ud800`<b>[red]"


class Server:
    """A round of Flower's two own APIs around hand-written clients."""

    def __init__(self, **settings: Any) -> None:
        self.settings = FederatedConfig(min_clients=2, metrics=("loss", "mrr"), **settings)
        self.told = Recorder()
        trainer = SimpleNamespace(reporter=self.told)
        self.task: Any = SimpleNamespace(settings=self.settings, agreement=common(), trainer=trainer)
        self.message = ScreenedStrategy(FedAvg(), self.task)
        self.message._reference = to_wire({"w": torch.zeros(3)})
        self.classic = AgreedStrategy(ClassicFedAvg(accept_failures=True), self.task)
        self.classic._reference = self.message._reference

    def trained(self, clients: dict[str, tuple[list[float], int, dict[str, Any]]]) -> list[list[float]]:
        """Return the global weights of the message API and of the classic API."""
        replies = []
        for node, (step, examples, values) in enumerate(clients.values(), start=2):
            told = MetricRecord({"num-examples": examples, **values})
            content = RecordDict({"arrays": to_wire({"w": torch.tensor(step)}), "metrics": told})
            replies.append(Message(content, reply_to=asking(RecordDict(), node=node)))
        arrays, _ = self.message.aggregate_train(1, replies)
        assert arrays is not None
        results: Any = [
            (SimpleNamespace(cid=name), FitRes(OK, ndarrays_to_parameters([np.float32(step)]), examples, values))
            for name, (step, examples, values) in clients.items()
        ]
        parameters, _ = self.classic.aggregate_fit(1, results, [])
        assert parameters is not None
        return [arrays["w"].numpy().tolist(), parameters_to_ndarrays(parameters)[0].tolist()]


OK = Status(Code.OK, "")
LOSS = {"loss": 1.0}


class ToInfinity(FedAvg):
    """Makes weights that are no numbers out of right ones."""

    def aggregate_train(self, *_: Any) -> Any:
        return to_wire({"w": torch.full((3,), float("inf"))}), MetricRecord()


class ClassicToInfinity(ClassicFedAvg):
    """Does so in the classic API."""

    def aggregate_fit(self, *_: Any) -> Any:
        return ndarrays_to_parameters([np.full(3, np.inf, np.float32)]), {}


def test_weights_that_are_not_finite_end_a_federation_of_flowers_own_apis() -> None:
    clients = {"a": ([1.0, 0.0, 0.0], 1, LOSS), "b": ([0.0, 1.0, 0.0], 1, LOSS)}
    words = r"weights in round 1 that are not finite or of another shape: w"
    server = Server()
    server.message.strategy = ToInfinity()
    with pytest.raises(FederationError, match=words):
        server.trained(clients)
    server = Server()
    server.classic.strategy = ClassicToInfinity(accept_failures=True)
    with pytest.raises(FederationError, match=words):
        server.trained(clients)


def test_flowers_own_apis_bound_what_is_far_off() -> None:
    server = Server()
    usual = {"a": ([1.0, 0.0, 0.0], 10, LOSS), "b": ([1.0, 0.0, 0.0], 10, LOSS)}
    for found in server.trained({**usual, "liar": ([0.0, 1e6, 0.0], 2**40, LOSS)}):
        assert found == pytest.approx([20 / 120, 500 / 120, 0.0], rel=1e-5)
    reason = f"is an outlier: its {2**40} examples count as 100; its norm 1e+06 is scaled down to 5"
    assert [note.partition(" is an")[2] for note in server.told.notes] == [reason.removeprefix("is an")] * 2


def test_the_classic_api_sums_in_one_order_whoever_answers_first() -> None:
    sizes = {"a": (1e4, 3), "b": (1e-3, 1), "c": (-1e4, 7), "d": (0.3, 11)}

    def summed(order: str) -> list[float]:
        server = Server(max_norm_ratio=None)
        return server.trained({name: ([sizes[name][0]] * 3, sizes[name][1], LOSS) for name in order})[1]

    assert {tuple(summed(order)) for order in ("abcd", "dcba", "bdac", "cadb")} == {tuple(summed("abcd"))}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (([float("nan")] * 3, 1, LOSS), "w holds values that are not finite"),
        (([3e38] * 3, 1, LOSS), "its norm 5.196e+38 is beyond any training"),
        (([1.0] * 4, 1, LOSS), "w"),
        (([1.0] * 3, -5, LOSS), "its number of examples is no whole number, or too large"),
        (([1.0] * 3, 5, {"loss": -1.0}), "its loss -1.0 is not between 0 and 1e+06"),
        (([1.0] * 3, 5, {"loss": 1.0, "mrr": 123456.0}), "its mrr 123456.0 is not between 0 and 1"),
    ],
)
def test_flowers_own_apis_refuse_by_name(reply: Any, reason: str) -> None:
    server = Server()
    usual = {"a": ([1.0, 0.0, 0.0], 1, LOSS), "b": ([0.0, 1.0, 0.0], 1, LOSS)}
    for found in server.trained({**usual, "liar": reply}):
        assert found == pytest.approx([0.5, 0.5, 0.0])
    assert len(server.told.notes) == 2
    assert all(f"refused: {reason}" in note for note in server.told.notes)


def test_measurements_of_flowers_own_apis_are_bounded() -> None:
    rows = {"a": (4, 0.25), "b": (6, 0.5), "liar": (2**40, 1.0), "fool": (5, 123456.0), HOSTILE: (3, float("nan"))}
    server = Server()
    replies = [
        Message(
            RecordDict({"m": MetricRecord({"num-examples": n, "mrr": value})}), reply_to=asking(RecordDict(), node=node)
        )
        for node, (n, value) in enumerate(rows.values(), start=2)
    ]
    found = server.message.aggregate_evaluate(1, replies)
    mean = (4 * 0.25 + 6 * 0.5 + 60 * 1.0) / 70
    assert found is not None
    assert dict(found) == {"mrr": pytest.approx(mean)}
    results: Any = [
        (SimpleNamespace(cid=name), EvaluateRes(OK, value, n, {"mrr": value})) for name, (n, value) in rows.items()
    ]
    loss, _ = server.classic.aggregate_evaluate(1, results, [])
    assert loss == pytest.approx(mean)
    assert len(server.told.notes) == 6
    assert all(note.isprintable() for note in server.told.notes)
