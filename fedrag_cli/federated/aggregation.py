"""From the updates of a round to the next global weights.

Where a strategy needs no more than the mean of the updates, they are read side by side, a block of a tensor at a time,
so that memory does not grow with the number of clients. Median, trimmed mean, Krum, Bulyan and QFedAvg compare whole
updates and get all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedrag_cli.config.schema import FederatedConfig, TransportDtype
from fedrag_cli.errors import FederationError
from fedrag_cli.federated.config import STRATEGIES, traits_of
from fedrag_cli.federated.fleet._flower import AppExitException
from fedrag_cli.federated.lora import Factors, adapter_pairs, best_of_rank, norm_of_product, residual, stacked
from fedrag_cli.federated.messages import EXAMPLES, STRATEGY_LOSS
from fedrag_cli.federated.privacy import gaussian_noise, noise_on_mean
from fedrag_cli.federated.strategies import strategy_state
from fedrag_cli.federated.validate_update import Update
from fedrag_cli.federated.weights import LARGEST_FLOAT16, Manifest, Weights, joined, to_wire
from fedrag_cli.text import printable

SAVED = "The round before is saved. Lower federated.max_update_norm, or the strategy's learning rate."


def aggregate(
    strategy: Strategy,
    number: int,
    updates: Mapping[str, Update],
    reply: Message,
    manifest: Manifest,
    settings: FederatedConfig,
) -> Weights:
    """Return the next global weights, as float32 in the order of the manifest.

    The order of the updates is that of the clients' names, so that sums do not depend on who came first. They are
    handed to the strategy, that of the settings, in place of any reply.

    Raises:
        FederationError: The strategy could not aggregate them, or made weights that are not finite.
    """
    ordered, traits = [updates[name] for name in sorted(updates)], traits_of(settings.strategy)
    if traits.gives_mean:
        weights = _mean(ordered, manifest, settings)
    else:
        means = traits.takes_mean
        contents = [mean_content(ordered, manifest, settings)] if means else [update.content() for update in ordered]
        weights = _in_order(number, _by_strategy(strategy, number, contents, reply), manifest)
    check_weights(number, weights, settings.transport_dtype)
    # Beside finite weights, such as the squares of large steps.
    for name, array in strategy_state(strategy).items():
        if not bool(np.isfinite(array).all()):
            raise FederationError(f"The strategy's state after round {number} is not finite: {name}.", SAVED)
    return weights


def check_weights(number: int, weights: Mapping[str, Tensor], dtype: TransportDtype) -> None:
    """Raise FederationError where aggregated weights are not finite, or too large for the number format to send."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _bad_weights(number, name)
        if dtype == "float16" and tensor.numel() and float(tensor.abs().max()) > LARGEST_FLOAT16:
            raise FederationError(
                f"Round {number} would leave values above {LARGEST_FLOAT16:g} in {name}, too large for float16.",
                "The round before is saved. Set federated.transport_dtype to float32 on the server and on all clients.",
            )


def _bad_weights(number: int, name: str) -> FederationError:
    return FederationError(
        f"The strategy made weights in round {number} that are not finite or of another shape: {name}.", SAVED
    )


def require_mean(strategy: object, settings: FederatedConfig) -> None:
    """Raise FederationError where the settings make a mean, but a strategy (or its config) looks at more than that."""
    traits, name = traits_of(strategy), getattr(strategy, "type", type(strategy).__name__)
    if settings.lora_aggregation == "svd" and (not traits.gives_mean or settings.privacy is not None):
        raise FederationError(
            f"federated.lora_aggregation: svd does not go with {name} or with federated.privacy.",
            "Use FedAvg or FedProx without privacy, or freeze_a.",
        )
    if settings.privacy is not None and not traits.takes_mean:
        raise FederationError(
            f"federated.privacy adds noise to the mean of the updates, which {name} does not take.",
            f"Use one of {', '.join(name for name, (config, _) in STRATEGIES.items() if config.takes_mean)}.",
        )


def weighted_mean(updates: list[Update], manifest: Manifest, deviation: float = 0.0) -> Weights:
    """Return the mean of updates by their weights, with noise: summed in float64 and rounded once to float32."""
    return {
        name: torch.from_numpy(joined(_mean_blocks(updates, name, deviation), shape))
        for name, shape in manifest.items()
    }


def makes_mean(settings: FederatedConfig) -> bool:
    """Return whether the settings ask for a mean that no strategy of Flower's computes by itself."""
    return settings.privacy is not None or settings.lora_aggregation == "svd"


def mean_content(updates: list[Update], manifest: Manifest, settings: FederatedConfig) -> RecordDict:
    """Return one update that stands for all: their mean, with the sum of their weights, and with noise if wanted."""
    total = sum(update.weight for update in updates)
    loss = sum(update.weight * update.metrics.get("loss", 0.0) for update in updates) / total
    metrics = MetricRecord({EXAMPLES: total, STRATEGY_LOSS: loss})
    return RecordDict({"arrays": to_wire(_mean(updates, manifest, settings), release=True), "metrics": metrics})


def lora_gap(updates: Mapping[str, Update], manifest: Manifest) -> float | None:
    """Return what averaging the factors of LoRA adapters misses of the mean of their products.

    It is the L2 norm of the difference over that of the mean product, all layers together; None where no adapter with
    both factors is tuned, or nothing was learned.
    """
    ordered = [updates[name] for name in sorted(updates)]
    missed = learned = 0.0
    for b, a in adapter_pairs(manifest):
        factors = _factors(ordered, b, a)
        missed += norm_of_product(*residual(factors)) ** 2
        learned += norm_of_product(*stacked(factors)) ** 2
    return math.sqrt(missed / learned) if learned else None


def _mean(updates: list[Update], manifest: Manifest, settings: FederatedConfig) -> Weights:
    mean = weighted_mean(updates, manifest, noise_on_mean(settings.privacy, len(updates)))
    if settings.lora_aggregation == "svd":
        for b, a in adapter_pairs(manifest):
            try:
                mean[b], mean[a] = (factor.float() for factor in best_of_rank(_factors(updates, b, a)))
            except RuntimeError as error:  # What torch's linear algebra raises.
                raise FederationError(f"The adapters of {b} cannot be made one: {error}") from error
    return mean


def _factors(updates: list[Update], b: str, a: str) -> list[Factors]:
    total = sum(update.weight for update in updates)
    return [Factors(update.tensor(b), update.tensor(a), update.weight / total) for update in updates]


def _mean_blocks(updates: list[Update], name: str, deviation: float) -> Iterator[NDArray[np.float32]]:
    total = sum(update.weight for update in updates)
    for blocks in zip(*(update.blocks(name) for update in updates), strict=True):
        summed = np.zeros(len(blocks[0]), np.float64)
        for update, block in zip(updates, blocks, strict=True):
            summed += block.astype(np.float64) * update.weight
        mean = summed / total
        if deviation:
            mean += gaussian_noise(len(mean), deviation)
        # What float32 cannot hold becomes infinite, and is told as that.
        with np.errstate(over="ignore"):
            yield mean.astype(np.float32)


def _by_strategy(strategy: Strategy, number: int, contents: list[RecordDict], reply: Message) -> ArrayRecord:
    # Strategies look at nothing else of a reply.
    replies = [Message(content, reply_to=reply) for content in contents]
    try:
        with np.errstate(all="ignore"):
            arrays, _ = strategy.aggregate_train(number, replies)
    except (AppExitException, ValueError, ZeroDivisionError, FloatingPointError) as error:
        raise FederationError(f"The strategy could not aggregate round {number}: {printable(str(error))}") from error
    if arrays is None:
        raise FederationError(
            f"The strategy gave no weights for the {len(replies)} updates of round {number}.",
            "It may need more clients, or fewer that it must allow to be malicious.",
        )
    return arrays


def _in_order(number: int, arrays: ArrayRecord, manifest: Manifest) -> Weights:
    """Return aggregated weights as float32, in the order of the agreement."""
    weights: Weights = {}
    for name, shape in manifest.items():
        if name not in arrays:
            raise FederationError(
                f"The strategy made no weights named {name} in round {number}.",
                "It has to return an array for each one that it was given. The round before is saved.",
            )
        # What float32 cannot hold becomes infinite, and is told as that.
        with np.errstate(over="ignore"):
            weights[name] = torch.from_numpy(arrays[name].numpy().astype(np.float32))
        if list(weights[name].shape) != shape:
            raise _bad_weights(number, name)
    return weights
