"""Differential privacy of each client's part: clipped updates, Gaussian noise, and the epsilon that rounds spend.

Neighbouring federations are those in which one client's updates are its own, or all zero (client-level privacy, arXiv
1710.06963). Flower's wrappers are not used: they draw the noise from NumPy's global generator, which a seed makes
predictable, add it after the strategy's step, and need every update in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrag_cli.config.schema import PrivacyConfig
from fedrag_cli.federated.weights import Weights

# Beyond it the second term of the formula is nothing but rounding; without it epsilon is bounded from above.
LARGEST_EXACT_MU = 100.0
STEPS_OF_BISECTION = 200


def clip_scale(norm: float, clipping_norm: float) -> float:
    """Return what an update is multiplied by, in (0, 1], so that its L2 norm is at most the clipping norm."""
    return min(1.0, clipping_norm / norm) if norm > 0 else 1.0


def noise_on_mean(privacy: PrivacyConfig | None, clients: int) -> float:
    """Return the standard deviation of the noise that the server adds to each number of a mean of updates.

    Args:
        privacy: The settings; without them, or where the clients add noise, it is 0.
        clients: Number of updates, each of the same weight, so that one moves the mean by its share.
    """
    if privacy is None or privacy.at != "server":
        return 0.0
    return privacy.noise_multiplier * privacy.clipping_norm / clients


def noise_of_client(privacy: PrivacyConfig, min_clients: int) -> float:
    """Return the standard deviation of the noise that each client adds to each number of its update.

    The noises of a round add up to at least that of a server, because no round has fewer updates than the quorum.
    """
    return privacy.noise_multiplier * privacy.clipping_norm / math.sqrt(min_clients)


def gaussian_noise(count: int, deviation: float) -> NDArray[np.float64]:
    """Return so many draws from the system's entropy: noise that follows from a known seed could be taken off again."""
    return np.random.default_rng().normal(0.0, deviation, count)


def protected(trained: Mapping[str, Tensor], received: Mapping[str, Tensor], norm: float, deviation: float) -> Weights:
    """Return weights whose difference to the received ones is clipped and has noise on it.

    Args:
        trained: Tensors by name after training.
        received: The global weights that training began with.
        norm: Largest L2 norm of the whole difference.
        deviation: Standard deviation of the noise on each number.

    Returns:
        float32 tensors by name.
    """
    changes = {name: trained[name].detach().cpu().double() - received[name].detach().cpu().double() for name in trained}
    length = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    scale = clip_scale(length, norm)
    weights: Weights = {}
    for name, change in changes.items():
        noise = torch.from_numpy(gaussian_noise(change.numel(), deviation)).view_as(change)
        weights[name] = (received[name].detach().cpu().double() + scale * change + noise).float()
    return weights


def spent_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return the epsilon that rounds of clipped updates with noise have spent.

    So many rounds with noise z are one with noise z / sqrt(rounds) (arXiv 1905.02383, corollary 3.3), whose epsilon is
    exact (arXiv 1805.06530, theorem 8). Where not all clients take part in a round, that is not counted in its favour.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum of the updates, in clipping norms.
        rounds: How many.
        delta: In (0, 1).
    """
    if rounds == 0:
        return 0.0
    mu = math.sqrt(rounds) / noise_multiplier
    if _delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(STEPS_OF_BISECTION):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(mu, middle) > delta else (low, middle)
    return high


def privacy_record(privacy: PrivacyConfig | None, rounds: int) -> dict[str, float]:
    """Return what rounds have spent, as it stands in every round's record; empty without privacy."""
    if privacy is None:
        return {}
    return {"epsilon": spent_epsilon(privacy.noise_multiplier, rounds, privacy.delta), "delta": privacy.delta}


def privacy_note(privacy: PrivacyConfig, rounds: int) -> str:
    """Return in words what so many rounds will spend, and what that does not cover."""
    who = "the server clips and adds noise" if privacy.at == "server" else "clients clip and add noise"
    spent = privacy_record(privacy, rounds)["epsilon"]
    return (
        f"Privacy: {who}; {rounds} round{'s spend' if rounds > 1 else ' spends'} epsilon {spent:.4g} at delta "
        f"{privacy.delta:g}, for the tuned weights alone and not for what clients report"
    )


def _delta(mu: float, epsilon: float) -> float:
    """Return Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)."""
    first = math.exp(_log_normal(mu / 2 - epsilon / mu))
    if mu > LARGEST_EXACT_MU:
        return first
    return first - math.exp(epsilon + _log_normal(-mu / 2 - epsilon / mu))


def _log_normal(value: float) -> float:
    """Return the logarithm of the normal distribution function, also where the function itself is too small."""
    return float(torch.special.log_ndtr(torch.tensor(value, dtype=torch.float64)))
