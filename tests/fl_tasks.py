"""Managers and federated tasks of tiny models; used by the tests of the federation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.trainer_managers.build import build_manager

NEVER = {"every": "never"}


SECTIONS = {
    "retriever": {
        "mode": "retriever",
        "retriever": {"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, "epochs": 1, "validation": NEVER},
    },
    "generator": {
        "mode": "generator",
        "generator": {"top_k": 2, "batch_size": 4, "learning_rate": 1e-2, "epochs": 1, "validation": NEVER},
    },
}


def make_manager(write_config: Callable[..., Path], side: str, **settings: Any) -> Any:
    trainer = {**SECTIONS[side], side: {**SECTIONS[side][side], **settings}}
    config = load_config(write_config(trainer=trainer))
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes)
    return build_manager(config, rag_system, train=data.train, validation=data.validation)


def make_task(write_config: Callable[..., Path], side: str = "retriever", **settings: Any) -> FLTask:
    task: FLTask = make_manager(write_config, side, **settings).get_federated_task()
    return task


def largest_difference(one: Weights, other: Weights) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)
