"""FedProx in the clients' training: which weights it pulls towards, and how strongly under gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fl_tasks import largest_difference, make_task

from fedrag_cli.federated.checkpoint import FitResult
from fedrag_cli.federated.weights import Weights

RATE, MU = 0.05, 3.0
PLAIN = {"optimizer": "sgd", "scheduler": "constant", "learning_rate": RATE, "max_grad_norm": 0.0}


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_every_round_pulls_towards_its_own_global_weights(write_config: Callable[..., Path], side: str) -> None:
    """The second step of plain gradient descent on all examples has the penalty's gradient, mu (theta_1 - theta_g)."""
    whole = {**PLAIN, "batch_size": 64}
    task = make_task(write_config, side, max_steps=2, **whole)
    draw = torch.Generator().manual_seed(0)
    first = task.weights()
    second = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in first.items()}

    def after(steps: int, number: int, weights: Weights) -> Weights:
        alone = make_task(write_config, side, max_steps=steps, **whole)
        return alone.fit(weights, {"server-round": number}).weights

    # One client goes through both rounds.
    for number, weights in ((1, first), (2, second)):
        held = task.fit(weights, {"server-round": number, "proximal-mu": MU}).weights
        one, free = after(1, number, weights), after(2, number, weights)
        pull = {name: RATE * MU * (one[name] - weights[name]) for name in one}
        assert max(float(tensor.abs().max()) for tensor in pull.values()) > 1e-4
        assert largest_difference(held, {name: free[name] - pull[name] for name in free}) <= 1e-6


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_the_loss_that_is_told_leaves_the_penalty_out(write_config: Callable[..., Path], side: str) -> None:
    """Both steps of gradient descent on all examples start from weights that the penalty has not changed yet."""

    def trained(mu: float, steps: int = 2) -> FitResult:
        task = make_task(write_config, side, max_steps=steps, **PLAIN, batch_size=64)
        return task.fit(task.weights(), {"server-round": 1, "proximal-mu": mu})

    start, one = trained(0.0).metrics["loss"], trained(0.0, steps=1)
    first = make_task(write_config, side).weights()
    moved = sum(float((one.weights[name] - first[name]).square().sum()) for name in first)
    strong = 10.0 / moved
    # The mean of the two steps' losses would be higher by a quarter of that.
    assert strong / 2 * moved / 2 == pytest.approx(2.5)
    assert trained(strong).metrics["loss"] == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_accumulated_batches_are_pulled_as_one_batch(write_config: Callable[..., Path], side: str) -> None:
    def trained(batch_size: int, accumulation: int, mu: float) -> Weights:
        settings = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "epochs": 2}
        task = make_task(write_config, side, **PLAIN, **settings)
        return task.fit(task.weights(), {"server-round": 1, "proximal-mu": mu}).weights

    # 14 examples: the last step of an epoch has fewer batches than the others.
    at_once = trained(4, 1, MU)
    assert largest_difference(trained(1, 4, MU), at_once) <= 1e-5
    assert largest_difference(trained(4, 1, 0.0), at_once) > 1e-3
