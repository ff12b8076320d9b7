"""Config dataclasses of the strategies, and their registration.

A strategy turns the clients' updates into the next global weights. Names and parameters are those of
`flwr.serverapp.strategy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from fedrag_cli.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config_class
from fedrag_cli.config.problems import Finding, KeyPath
from fedrag_cli.registry import Registry

if TYPE_CHECKING:
    from fedrag_cli.config.schema import Config

Momentum = Annotated[float, Interval(ge=0, lt=1)]


@config_class
class StrategyConfig:
    """What all strategies share, and what a federation asks of them; configs of third parties derive from it too."""

    # Whether only the mean of the updates, weighted by examples, matters; and whether it is the next global model.
    takes_mean: ClassVar[bool] = False
    gives_mean: ClassVar[bool] = False
    # Whether it leaves out by itself what is far from the rest; and whether it weighs clients by their losses.
    is_robust: ClassVar[bool] = False
    weighs_losses: ClassVar[bool] = False

    fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of the clients that train in a round, drawn anew each time; never fewer than `min_clients`."""


@config_class
class FedAvgConfig(StrategyConfig):
    """Mean of the updates, weighted by examples (arXiv 1602.05629)."""

    takes_mean: ClassVar[bool] = True
    gives_mean: ClassVar[bool] = True

    type: Literal["FedAvg"] = "FedAvg"
    """Names this strategy."""


@config_class
class FedAvgMConfig(StrategyConfig):
    """FedAvg with momentum on the server (arXiv 1909.06335)."""

    takes_mean: ClassVar[bool] = True

    type: Literal["FedAvgM"] = "FedAvgM"
    """Names this strategy."""
    server_learning_rate: PositiveFloat = 1.0
    """Step along the mean update."""
    server_momentum: Momentum = 0.9
    """Share of the former step that is kept."""


@config_class
class FedProxConfig(StrategyConfig):
    """FedAvg whose clients add mu / 2 * ||theta - theta_global||^2 to their loss (arXiv 1812.06127)."""

    takes_mean: ClassVar[bool] = True
    gives_mean: ClassVar[bool] = True

    type: Literal["FedProx"] = "FedProx"
    """Names this strategy."""
    proximal_mu: NonNegativeFloat = 0.01
    """Strength of the proximal term; the paper tries 0.001 to 1."""


@config_class
class FedAdagradConfig(StrategyConfig):
    """Adagrad on the server (arXiv 2003.00295)."""

    takes_mean: ClassVar[bool] = True

    type: Literal["FedAdagrad"] = "FedAdagrad"
    """Names this strategy."""
    eta: PositiveFloat = 0.01
    """Learning rate of the server."""
    tau: PositiveFloat = 1e-3
    """Adaptivity: the smaller, the more each weight's own history counts."""


@config_class
class FedAdamConfig(StrategyConfig):
    """Adam on the server (arXiv 2003.00295)."""

    takes_mean: ClassVar[bool] = True

    type: Literal["FedAdam"] = "FedAdam"
    """Names this strategy."""
    eta: PositiveFloat = 0.01
    """Learning rate of the server."""
    beta_1: Momentum = 0.9
    """Decay of the first moment."""
    beta_2: Momentum = 0.99
    """Decay of the second moment."""
    tau: PositiveFloat = 1e-3
    """Adaptivity: the smaller, the more each weight's own history counts."""


@config_class
class FedYogiConfig(StrategyConfig):
    """Yogi on the server (arXiv 2003.00295)."""

    takes_mean: ClassVar[bool] = True

    type: Literal["FedYogi"] = "FedYogi"
    """Names this strategy."""
    eta: PositiveFloat = 0.01
    """Learning rate of the server."""
    beta_1: Momentum = 0.9
    """Decay of the first moment."""
    beta_2: Momentum = 0.99
    """Decay of the second moment."""
    tau: PositiveFloat = 1e-3
    """Adaptivity: the smaller, the more each weight's own history counts."""


@config_class
class FedMedianConfig(StrategyConfig):
    """Median of each weight over the clients (arXiv 1803.01498)."""

    is_robust: ClassVar[bool] = True

    type: Literal["FedMedian"] = "FedMedian"
    """Names this strategy."""


@config_class
class FedTrimmedAvgConfig(StrategyConfig):
    """Mean of each weight without its extremes (arXiv 1803.01498)."""

    is_robust: ClassVar[bool] = True

    type: Literal["FedTrimmedAvg"] = "FedTrimmedAvg"
    """Names this strategy."""
    beta: Annotated[float, Interval(ge=0, lt=0.5)] = 0.2
    """Share cut off at each end."""


@config_class
class KrumConfig(StrategyConfig):
    """The one update that is closest to its neighbours (NeurIPS 2017, Blanchard et al.)."""

    is_robust: ClassVar[bool] = True

    type: Literal["Krum"] = "Krum"
    """Names this strategy."""
    num_malicious_nodes: NonNegativeInt = 0
    """How many clients may send anything; needs at least 2 f + 3 clients."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield where the quorum is too small."""
        yield from _check_quorum(config, self.type, self.num_malicious_nodes, 2 * self.num_malicious_nodes + 3)


@config_class
class MultiKrumConfig(StrategyConfig):
    """Mean of the updates that are closest to their neighbours (NeurIPS 2017, Blanchard et al.)."""

    is_robust: ClassVar[bool] = True

    type: Literal["MultiKrum"] = "MultiKrum"
    """Names this strategy."""
    num_malicious_nodes: NonNegativeInt = 0
    """How many clients may send anything; needs at least 2 f + 3 clients."""
    num_nodes_to_select: PositiveInt = 1
    """How many updates are averaged."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield where the quorum is too small."""
        yield from _check_quorum(config, self.type, self.num_malicious_nodes, 2 * self.num_malicious_nodes + 3)
        quorum = config.federated.min_clients if config.federated else self.num_nodes_to_select
        if self.num_nodes_to_select > quorum:
            yield (*path, "num_nodes_to_select"), f"must not be above min_clients ({quorum})"


@config_class
class BulyanConfig(StrategyConfig):
    """Multi-Krum, then the mean of each weight's middle values (arXiv 1802.07927)."""

    is_robust: ClassVar[bool] = True

    type: Literal["Bulyan"] = "Bulyan"
    """Names this strategy."""
    num_malicious_nodes: NonNegativeInt = 0
    """How many clients may send anything; needs at least 4 f + 3 clients."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield where the quorum is too small."""
        yield from _check_quorum(config, self.type, self.num_malicious_nodes, 4 * self.num_malicious_nodes + 3)


@config_class
class QFedAvgConfig(StrategyConfig):
    """Clients with a higher loss count for more (arXiv 1905.10497); the loss is their mean training loss."""

    weighs_losses: ClassVar[bool] = True

    type: Literal["QFedAvg"] = "QFedAvg"
    """Names this strategy."""
    q: NonNegativeFloat = 0.1
    """How much more; 0 weighs all clients alike."""
    client_learning_rate: PositiveFloat | None = None
    """Inverse of the estimated Lipschitz constant; the trainer's learning rate by default."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield where clients do not report the losses."""
        if config.federated is not None and "loss" not in config.federated.metrics:
            yield ("federated", "metrics"), "must have loss in it for QFedAvg, which weighs clients by it"


def _check_quorum(config: Config, strategy: str, malicious: int, needed: int) -> Iterator[Finding]:
    if config.federated is not None and config.federated.min_clients < needed:
        message = f"must be at least {needed} for {strategy} with num_malicious_nodes {malicious}"
        yield ("federated", "min_clients"), message


STRATEGIES: dict[str, tuple[type[StrategyConfig], str]] = {
    "FedAvg": (FedAvgConfig, "mean of the updates, weighted by examples"),
    "FedAvgM": (FedAvgMConfig, "FedAvg with momentum on the server"),
    "FedProx": (FedProxConfig, "FedAvg with a proximal term in the clients' loss"),
    "FedAdagrad": (FedAdagradConfig, "Adagrad on the server"),
    "FedAdam": (FedAdamConfig, "Adam on the server"),
    "FedYogi": (FedYogiConfig, "Yogi on the server"),
    "FedMedian": (FedMedianConfig, "median of each weight"),
    "FedTrimmedAvg": (FedTrimmedAvgConfig, "mean of each weight without its extremes"),
    "Krum": (KrumConfig, "the update closest to its neighbours"),
    "MultiKrum": (MultiKrumConfig, "mean of the updates closest to their neighbours"),
    "Bulyan": (BulyanConfig, "Multi-Krum, then the mean of each weight's middle values"),
    "QFedAvg": (QFedAvgConfig, "clients with a higher loss count for more"),
}


def traits_of(strategy: object) -> StrategyConfig | type[StrategyConfig]:
    """Return what can be said of a strategy: of its config, or of one of Flower's, of either API, by its class."""
    if isinstance(strategy, StrategyConfig):
        return strategy
    for kind in type(strategy).__mro__:
        if kind.__name__ in STRATEGIES:
            traits = STRATEGIES[kind.__name__][0]
            # What derives from one that needs only the mean may look at more.
            return StrategyConfig if traits.takes_mean and kind is not type(strategy) else traits
    return StrategyConfig


def public_settings(federated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a federation without where keys and certificates are."""
    private = ("key", "allowed_keys", "certificate", "certificate_key", "ca_certificate")
    return {name: value for name, value in federated.items() if name not in private}


def register(registry: Registry) -> None:
    """Register the strategies."""
    for name, (config_class_of_strategy, help_line) in STRATEGIES.items():
        builder = "fedrag_cli.federated.strategies:build_strategy"
        registry.register("strategy", name, config_class_of_strategy, builder, help_line)
