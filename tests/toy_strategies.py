"""Federations of clients that return known weights, for a strategy; used by the tests of the federation."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Message
from toy_federation import ToyClient, common

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.federated.checkpoint import RoundState
from fedrag_cli.federated.config import STRATEGIES
from fedrag_cli.federated.grid import InProcessGrid
from fedrag_cli.federated.handshake import Agreement
from fedrag_cli.federated.rounds_loop import Federation
from fedrag_cli.registry import build
from fedrag_cli.runs.reporter import SilentReporter

COMMON = Agreement(1, "retriever", {"w": [3]}, {}, {})
START = torch.tensor([1.0, 2.0, 3.0])


STEPS = {"a": [1.0, 0.0, 0.0], "b": [0.0, 2.0, 0.0], "c": [0.0, 0.0, 4.0]}
EXAMPLES = {"a": 1, "b": 2, "c": 5}


UNBOUNDED: dict[str, Any] = {"settings": {"max_norm_ratio": None}}


def federate(strategy: Any, clients: list[ToyClient], rounds: int = 1, **options: Any) -> RoundState:
    names = {client.name: client for client in clients}
    settings = FederatedConfig(
        rounds=rounds,
        min_clients=options.pop("min_clients", len(clients)),
        strategy=strategy,
        rejoin_timeout=0.01,
        transport_dtype=options.pop("transport_dtype", "float32"),
        privacy=options.pop("privacy", None),
        **options.pop("settings", {}),
    )
    built = build("strategy", strategy, min_clients=settings.min_clients, learning_rate=0.5)
    state = options.pop("state", None) or RoundState(0, {"w": START.clone()})
    federation = Federation(
        InProcessGrid(names),  # type: ignore[arg-type]
        common(state.weights["w"].numel()),
        settings,
        built,
        seed=1,
        reporter=options.pop("reporter", SilentReporter()),
        **options,
    )
    return federation.run(state)


def toys() -> list[ToyClient]:
    return [ToyClient(name, STEPS[name], EXAMPLES[name]) for name in STEPS]


def strategy(name: str, **settings: Any) -> Any:
    return STRATEGIES[name][0](**settings)


def moved(state: RoundState) -> list[float]:
    values: list[float] = (state.weights["w"] - START).tolist()
    return values


class MeasuringClient(ToyClient):
    """Has validation examples too, and reports the mean of what it received plus its own number as their loss."""

    validation_examples = 1
    offset = 0.0

    def __call__(self, message: Message) -> Message:
        reply = super().__call__(message)
        if message.metadata.message_type != "query":
            (record,) = reply.content.metric_records.values()
            received = self.final if self.final is not None else self.received[-1]
            record["validation-examples"] = self.validation_examples
            record["validation_loss"] = float(received["w"].mean()) + self.offset
        return reply


def measuring(name: str, step: list[float], examples: int, loss: float, checked: int, offset: float) -> MeasuringClient:
    client = MeasuringClient(name, step, examples, loss)
    client.validation_examples, client.offset = checked, offset
    return client
