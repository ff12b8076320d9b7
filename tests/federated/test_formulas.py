"""Strategies and means against their formulas in float64, over two rounds, with settings that are not the defaults."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_federation import ToyClient
from toy_strategies import START, federate, measuring, strategy

from fedrag_cli.federated.checkpoint import RoundState
from fedrag_cli.federated.config import STRATEGIES
from fedrag_cli.registry import build

Vector = NDArray[np.float64]
# What each client trains: a part of the weights is lost, and a step is added; so rounds differ.
CLIENTS = {"a": (0.9, [1.0, -0.5, 0.25], 1), "b": (0.5, [0.1, 2.0, -3.0], 2), "c": (0.7, [-0.4, 0.3, 4.0], 5)}
ETA, BETA_1, BETA_2, TAU = 0.3, 0.6, 0.8, 0.05


def clients() -> list[ToyClient]:
    def spoiled(kept: float, step: list[float]) -> ToyClient:
        toy = ToyClient("", [0.0, 0.0, 0.0])
        toy.change = lambda weights: {"w": kept * weights["w"] + torch.tensor(step)}
        return toy

    toys = []
    for name, (kept, step, examples) in CLIENTS.items():
        toy = spoiled(kept, step)
        toy.name, toy.examples = name, examples
        toys.append(toy)
    return toys


def change(weights: Vector) -> Vector:
    """Return the mean of what the clients change, weighted by their examples."""
    total = sum(examples for _, _, examples in CLIENTS.values())
    mean = np.zeros(3)
    for kept, step, examples in CLIENTS.values():
        mean += examples / total * (kept * weights + np.array(step))
    return mean - weights


def fedavgm(weights: Vector, rounds: int) -> Vector:
    """arXiv 1909.06335, section 4.3: v = beta v + delta, w = w + eta v."""
    momentum = np.zeros(3)
    for _ in range(rounds):
        momentum = BETA_1 * momentum + change(weights)
        weights = weights + ETA * momentum
    return weights


def adaptive(name: str, weights: Vector, rounds: int) -> Vector:
    """arXiv 2003.00295, algorithm 2.

    As Flower has it: v starts at 0, Adagrad has no momentum, and Adam's step is corrected for the bias of the start as
    if one round more had gone by.
    """
    m, v = np.zeros(3), np.zeros(3)
    beta_1 = 0.0 if name == "FedAdagrad" else BETA_1
    for number in range(1, rounds + 1):
        delta = change(weights)
        m = beta_1 * m + (1 - beta_1) * delta
        rate = ETA
        if name == "FedAdagrad":
            v = v + delta**2
        elif name == "FedAdam":
            v = BETA_2 * v + (1 - BETA_2) * delta**2
            rate = ETA * np.sqrt(1 - BETA_2 ** (number + 1)) / (1 - BETA_1 ** (number + 1))
        else:
            v = v - (1 - BETA_2) * delta**2 * np.sign(v - delta**2)
        weights = weights + rate * m / (np.sqrt(v) + TAU)
    return weights


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("name", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_steps_of_the_server_are_those_of_the_papers(name: str, rounds: int) -> None:
    settings = {"eta": ETA, "beta_1": BETA_1, "beta_2": BETA_2, "tau": TAU}
    if name == "FedAvgM":
        settings = {"server_learning_rate": ETA, "server_momentum": BETA_1}
    if name == "FedAdagrad":
        settings = {"eta": ETA, "tau": TAU}
    start = START.double().numpy()
    expected = fedavgm(start, rounds) if name == "FedAvgM" else adaptive(name, start, rounds)
    found = federate(strategy(name, **settings), clients(), rounds=rounds).weights["w"]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=2e-6, rel=2e-6)


POINTS = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.35, 0], [0.42, 0.4, 0], [1.5, 1, 1], [2, 1, 1.5], [9, 9, 9]])
COUNTS = [3, 1, 4, 1, 5, 9, 2]


def chosen_by_krum(malicious: int, count: int) -> list[int]:
    """Blanchard et al. 2017: a score is the sum of the squared distances to the n - f - 2 nearest others."""
    scores = []
    for number, point in enumerate(POINTS):
        others = np.delete(POINTS, number, axis=0)
        scores.append(np.sort(((others - point) ** 2).sum(axis=1))[: len(POINTS) - malicious - 2].sum())
    return sorted(np.argsort(scores)[:count].tolist())


@pytest.mark.parametrize("malicious", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_multikrum_takes_the_mean_of_so_many_updates(malicious: int, count: int) -> None:
    toys = [ToyClient(f"c{n}", POINTS[n].tolist(), COUNTS[n]) for n in range(len(POINTS))]
    chosen = chosen_by_krum(malicious, count)
    expected = np.average(POINTS[chosen], axis=0, weights=[COUNTS[n] for n in chosen])
    kind = strategy("MultiKrum", num_malicious_nodes=malicious, num_nodes_to_select=count)
    state = RoundState(0, {"w": torch.zeros(3)})
    assert federate(kind, toys, state=state).weights["w"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_setting_reaches_flowers_strategy_of_that_name(name: str) -> None:
    fields = [field for field in dataclasses.fields(STRATEGIES[name][0]) if field.name not in ("type", "fraction")]
    # Each one has a value of its own, so that two that are swapped are seen.
    values = {
        field.name: number + 2 if field.name.startswith("num_") else 0.3 + number / 100
        for number, field in enumerate(fields)
    }
    built = build("strategy", strategy(name, fraction=0.75, **values), min_clients=3, learning_rate=0.5)
    assert type(built).__name__ == name
    assert {key: vars(built)[key] for key in values} == values
    assert vars(built)["fraction_train"] == 0.75
    assert {vars(built)[key] for key in ("min_train_nodes", "min_available_nodes")} == {3}


def test_losses_are_averaged_over_examples_and_measurements_over_validation_examples() -> None:
    # The two weigh the clients the other way round.
    a = measuring("a", [1.0, 1.0, 1.0], 1, 0.25, 9, 0.125)
    b = measuring("b", [3.0, 3.0, 3.0], 3, 2.25, 1, 4.0)
    state = federate(strategy("FedAvg"), [a, b], rounds=2)
    assert [row["loss"] for row in state.history] == pytest.approx([(0.25 + 3 * 2.25) / 4] * 2)
    assert [row["examples"] for row in state.history] == [4, 4]
    # Each round adds (1 + 3 * 3) / 4 to the weights, whose mean is 2 at the start.
    offset = (9 * 0.125 + 4.0) / 10
    for number in range(3):
        found = state.evaluations[str(number)]["clients"]
        assert found["examples"] == 10
        assert found["metrics"] == {"validation_loss": pytest.approx(2 + 2.5 * number + offset, abs=1e-5)}
