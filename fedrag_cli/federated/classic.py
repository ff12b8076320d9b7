"""The federated task behind Flower's classic API: `flwr.server.Server` and `flwr.client.NumPyClient`.

That API sends lists of arrays without names. The order is that of the sorted names, and a hash of names and shapes
travels in the config, so that a client with other tensors refuses instead of mixing them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.client import NumPyClient
from flwr.common import EvaluateRes, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.history import History
from flwr.server.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from fedrag_cli.errors import ConfigError, ConnectionFailedError, FederationError
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights, to_arrays

MANIFEST = "manifest"


class ClassicClient(NumPyClient):
    """A client of the classic API around a federated task.

    Args:
        task: The task with this client's model and data.
    """

    def __init__(self, task: FLTask) -> None:
        """Keep the task; raises ConfigError where its settings ask for what this API cannot do."""
        _require_plain_weights(task)
        self.task = task

    def get_parameters(self, config: dict[str, Scalar]) -> list[NDArray[Any]]:
        """Return the trained tensors in the order of their names."""
        return list(to_arrays(self.task.weights()).values())

    def fit(
        self, parameters: list[NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[list[NDArray[Any]], int, dict[str, Scalar]]:
        """Train from the given weights on this client's own examples."""
        result = self.task.fit(self._named(parameters, config), config)
        return list(to_arrays(result.weights).values()), result.examples, self._listed(result.metrics)

    def evaluate(
        self, parameters: list[NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Measure the given weights on this client's own validation examples."""
        result = self.task.evaluate(self._named(parameters, config), config)
        return result.metrics.get("validation_loss", 0.0), result.examples, self._listed(result.metrics)

    def _listed(self, metrics: Mapping[str, float]) -> dict[str, Scalar]:
        return {name: metrics[name] for name in self.task.settings.metrics if name in metrics}

    def _named(self, parameters: Sequence[NDArray[Any]], config: Mapping[str, Scalar]) -> Weights:
        theirs = config.get(MANIFEST)
        if theirs is not None and theirs != self.task.digest:
            raise ConnectionFailedError(
                "The server tunes other tensors than this client.", "Use the same base model and LoRA settings."
            )
        return named_weights(self.task, parameters)


class ClassicServer(Server):
    """A server of the classic API whose model ends with the global weights.

    Args:
        task: The task around the model that the federation starts from.
        strategy: A strategy of `flwr.server.strategy`; FedAvg by default.
    """

    def __init__(self, task: FLTask, strategy: Strategy | None = None) -> None:
        """Give the strategy the model's weights where it has none of its own.

        Raises:
            ConfigError: The settings ask for what this API cannot do.
        """
        _require_plain_weights(task)
        self.task = task
        initial = ndarrays_to_parameters(list(to_arrays(task.weights()).values()))
        chosen: Any = strategy if strategy is not None else _fedavg(task)
        if getattr(chosen, "initial_parameters", None) is None:
            chosen.initial_parameters = initial
        super().__init__(client_manager=SimpleClientManager(), strategy=chosen)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds, and put the global weights into the model."""
        history, elapsed = super().fit(num_rounds, timeout)
        self.task.load(named_weights(self.task, parameters_to_ndarrays(self.parameters)))
        return history, elapsed


def named_weights(task: FLTask, parameters: Sequence[NDArray[Any]]) -> Weights:
    """Give arrays their names back.

    Args:
        task: The task whose tensors they are.
        parameters: Arrays in the order of the sorted names.

    Raises:
        FederationError: Their number or a shape differs.
    """
    manifest = task.agreement.manifest
    shapes = [list(array.shape) for array in parameters]
    if shapes != list(manifest.values()):
        raise FederationError(
            f"{len(shapes)} tensors came over the classic API, whose shapes are not those of the {len(manifest)} "
            "tensors that are tuned here.",
            "Use the same base model and LoRA settings on server and clients.",
        )
    return {name: torch.from_numpy(array.copy()) for name, array in zip(manifest, parameters, strict=True)}


class MeasuredFedAvg(FedAvg):
    """FedAvg that leaves clients without validation examples out of the evaluation."""

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average what was measured; nothing where no client has measured anything."""
        measured = [(client, result) for client, result in results if result.num_examples]
        if not measured:
            return None, {}
        return super().aggregate_evaluate(server_round, measured, failures)


def _require_plain_weights(task: FLTask) -> None:
    if task.settings.lora_aggregation == "svd":
        raise ConfigError(
            "Flower's classic API averages adapters by its own strategies, without federated.lora_aggregation: svd.",
            "Set it to average or freeze_a, or use server_app() and client_app().",
        )
    if task.settings.privacy is not None:
        raise ConfigError(
            "Flower's classic API sends weights as they are, without federated.privacy.",
            "Remove federated.privacy, or use server_app() and client_app().",
        )
    if task.settings.transport_dtype != "float32":
        raise ConfigError(
            f"Flower's classic API sends weights as float32, not {task.settings.transport_dtype}.",
            "Set federated.transport_dtype to float32, or use server_app() and client_app().",
        )


def _fedavg(task: FLTask) -> FedAvg:
    def config(server_round: int) -> dict[str, Scalar]:
        return {"server-round": server_round, MANIFEST: task.digest}

    def mean(results: list[tuple[int, dict[str, Scalar]]]) -> dict[str, Scalar]:
        names = sorted({name for _, metrics in results for name in metrics})
        return {name: _weighted(results, name) for name in names}

    clients = task.settings.min_clients
    return MeasuredFedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=config,
        on_evaluate_config_fn=config,
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
        accept_failures=True,
    )


def _weighted(results: list[tuple[int, dict[str, Scalar]]], name: str) -> float:
    known = [(examples, float(metrics[name])) for examples, metrics in results if name in metrics]
    total = sum(examples for examples, _ in known)
    return sum(examples * value for examples, value in known) / total if total else 0.0
