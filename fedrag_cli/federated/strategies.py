"""Strategies of `flwr.serverapp.strategy`, built from their configs, and their state for checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

State = dict[str, NDArray[Any]]
SEPARATOR = "/"


def build_strategy(config: Any, *, min_clients: int, learning_rate: float) -> Strategy:
    """Build the strategy of Flower's that a config of `federated/config.py` names; QFedAvg needs the learning rate."""
    parameters = dataclasses.asdict(config)
    del parameters["type"], parameters["fraction"]
    if parameters.get("client_learning_rate", 0) is None:
        parameters["client_learning_rate"] = learning_rate
    built: Strategy = getattr(flower, config.type)(
        fraction_train=config.fraction,
        fraction_evaluate=1.0,
        min_train_nodes=min_clients,
        min_evaluate_nodes=min_clients,
        min_available_nodes=min_clients,
        **parameters,
    )
    return built


def strategy_state(strategy: Strategy) -> State:
    """Return the arrays that a strategy keeps from round to round, such as FedAdam's moments, by name.

    Strategies keep them as attributes: dicts or lists of arrays, or array records.
    """
    state: State = {}
    for attribute, value in vars(strategy).items():
        for key, array in _arrays_in(value).items():
            state[f"{attribute}{SEPARATOR}{_kind(value)}{SEPARATOR}{key}"] = np.asarray(array)
    return state


def restore_strategy(strategy: Strategy, state: Mapping[str, NDArray[Any]]) -> None:
    """Put arrays back that `strategy_state` gave."""
    found: dict[str, tuple[str, dict[str, NDArray[Any]]]] = {}
    for name, array in state.items():
        attribute, kind, key = name.split(SEPARATOR, 2)
        found.setdefault(attribute, (kind, {}))[1][key] = array
    for attribute, (kind, arrays) in found.items():
        value: Any = arrays
        if kind == "list":
            value = [arrays[key] for key in sorted(arrays, key=int)]
        elif kind == "record":
            value = ArrayRecord({key: Array(array) for key, array in arrays.items()})
        setattr(strategy, attribute, value)


def _kind(value: Any) -> str:
    return "record" if isinstance(value, ArrayRecord) else "list" if isinstance(value, list) else "dict"


def _arrays_in(value: Any) -> dict[str, NDArray[Any]]:
    if isinstance(value, ArrayRecord):
        return {name: array.numpy() for name, array in value.items()}
    if isinstance(value, dict) and value and all(isinstance(item, np.ndarray) for item in value.values()):
        return {str(name): item for name, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, np.ndarray | np.generic) for item in value):
        return {str(number): np.asarray(item) for number, item in enumerate(value)}
    return {}
