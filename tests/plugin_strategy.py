"""A strategy of a third party: a part of the way to the mean of the updates; used by the tests of plug-ins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedrag_cli.config.fields import PositiveFloat, PositiveInt, config_class
from fedrag_cli.federated.config import StrategyConfig
from fedrag_cli.registry import Registry

if TYPE_CHECKING:
    from flwr.app import Message


@config_class
class PartConfig(StrategyConfig):
    """A part of the way to the mean of the updates."""

    takes_mean: ClassVar[bool] = True

    type: Literal["Part"] = "Part"
    """Names this strategy."""
    part: PositiveFloat = 0.5
    """How much of the way."""
    least: PositiveInt = 1
    """Fewest clients."""

    def check(self, config: Any, path: Any) -> Iterator[Any]:
        if config.federated.min_clients < self.least:
            yield ("federated", "min_clients"), f"must be at least {self.least} for Part"


def build(config: PartConfig, *, min_clients: int, learning_rate: float) -> Any:
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    class Part(FedAvg):
        """Keeps the way that it has gone, as momentum does."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.gone: dict[str, Any] = {}

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            self.before = {name: array.numpy() for name, array in arrays.items()}
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            (mean,) = replies
            arrays, metrics = super().aggregate_train(server_round, [mean])
            assert arrays is not None
            for name, old in self.before.items():
                step = config.part * (arrays[name].numpy() - old) + 0.1 * self.gone.get(name, 0.0)
                self.gone[name] = np.asarray(step, np.float32)
            made = ArrayRecord({name: Array(old + self.gone[name]) for name, old in self.before.items()})
            self.before = {}
            return made, metrics

    nodes = {"min_train_nodes": min_clients, "min_evaluate_nodes": min_clients, "min_available_nodes": min_clients}
    return Part(fraction_train=config.fraction, **nodes)


def register(registry: Registry) -> None:
    registry.register("strategy", "Part", PartConfig, "plugin_strategy:build", "a part of the way to the mean")
