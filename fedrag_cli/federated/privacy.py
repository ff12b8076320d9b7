"""Differential privacy of each client's part: clipped updates, Gaussian noise, and the epsilon that rounds spend.

Two epsilons are told. Neighbouring federations are those in which one client's updates are its own, or all zero
(client-level privacy, arXiv 1710.06963); or those in which they are its own, or any others, which costs more. Who takes
part in a round is no secret: the number of its updates, by which the noise on the sum is divided, is the same in both.

Flower's wrappers are not used: they draw the noise from NumPy's global generator, which a seed makes predictable, add
it after the strategy's step, and need every update in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrag_cli.config.schema import PrivacyConfig
from fedrag_cli.federated.weights import Weights
from fedrag_cli.runs.reporter import epsilon_text

# Beyond it the second term of the formula is nothing but rounding; without it epsilon is bounded from above.
LARGEST_EXACT_MU = 100.0
STEPS_OF_BISECTION = 200
Ledger = Sequence[Mapping[str, Any] | None]


def clip_scale(norm: float, clipping_norm: float) -> float:
    """Return what an update is multiplied by, in (0, 1], so that its L2 norm is at most the clipping norm."""
    return min(1.0, clipping_norm / norm) if norm > 0 else 1.0


def noise_on_mean(privacy: PrivacyConfig | None, clients: int) -> float:
    """Return the standard deviation of the noise that the server adds to each number of a mean of so many updates.

    They weigh the same, so that one moves the mean by its share; without privacy of the server it is 0.
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
    """Return float32 weights whose difference to the received ones is clipped to an L2 norm and has noise on it."""
    changes = {name: trained[name].detach().cpu().double() - received[name].detach().cpu().double() for name in trained}
    length = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    scale = clip_scale(length, norm)
    weights: Weights = {}
    for name, change in changes.items():
        noise = torch.from_numpy(gaussian_noise(change.numel(), deviation)).view_as(change)
        weights[name] = (received[name].detach().cpu().double() + scale * change + noise).float()
    return weights


def epsilon_of_ledger(ledger: Ledger, delta: float, replaced: bool = False) -> float:
    """Return the epsilon that rounds have spent, each with its own noise; infinity where one had none.

    Rounds with noise z_i are one with mu = sqrt(sum 1 / z_i^2) (arXiv 1905.02383, corollary 3.3), whose epsilon is
    exact (arXiv 1805.06530, theorem 8). Where not all clients take part in a round, that is not counted in its favour.

    Where updates are replaced by any others, and not by zeros, that moves their sum by two clipping norms instead of
    one.
    """
    if any(entry is None for entry in ledger):
        return math.inf
    sensitivity = 2.0 if replaced else 1.0
    rounds = Counter(entry["noise_multiplier"] for entry in ledger if entry is not None)
    return _epsilon(math.hypot(*(sensitivity * math.sqrt(count) / noise for noise, count in rounds.items())), delta)


def ledger_entry(privacy: PrivacyConfig | None, sites: int) -> dict[str, Any] | None:
    """Return what a round's record keeps of its privacy, from which epsilon follows later; None without privacy.

    `sites` is the number of updates, by which clipped updates and noise were divided.
    """
    return None if privacy is None else {**dataclasses.asdict(privacy), "sites": sites}


def ledger_of(history: Sequence[Mapping[str, Any]]) -> Ledger:
    """Return the ledger that the records of rounds hold; rounds of an earlier version count as without privacy."""
    return [row.get("privacy") for row in history]


def privacy_record(ledger: Ledger) -> dict[str, float | None]:
    """Return what rounds have spent, as it stands in every round's record; empty where no round had privacy.

    `epsilon` is against zeroing one site's updates, `epsilon_replaced` against replacing them, at the newest `delta`.
    They are None where nothing bounds what was told, because a round had no noise.
    """
    deltas = [entry["delta"] for entry in ledger if entry is not None]
    if not deltas:
        return {}
    spent = {
        "epsilon": epsilon_of_ledger(ledger, deltas[-1]),
        "epsilon_replaced": epsilon_of_ledger(ledger, deltas[-1], replaced=True),
    }
    return {name: value if math.isfinite(value) else None for name, value in spent.items()} | {"delta": deltas[-1]}


def privacy_note(privacy: PrivacyConfig, rounds: int, ledger: Ledger = ()) -> str:
    """Return in words what so many more rounds will have spent at the end, and what that does not cover."""
    who = "the server clips and adds noise" if privacy.at == "server" else "clients clip and add noise"
    spent = privacy_record([*ledger, *[ledger_entry(privacy, 0)] * rounds])
    count = len(ledger) + rounds
    return (
        f"Privacy: {who}; {count} round{'s spend' if count > 1 else ' spends'} {epsilon_text(spent, long=True)}, "
        "for the tuned weights alone and not for what clients report"
    )


def largest_noisy_norm(privacy: PrivacyConfig, min_clients: int, numbers: int) -> float:
    """Return the L2 norm above which no clipped update with a client's share of noise comes to lie.

    The norm of the noise exceeds its deviation times sqrt(numbers) + 8 once in 10^13 times. The bound looks at nothing
    but the update itself, so what it refuses tells nothing about other sites.
    """
    deviation = noise_of_client(privacy, min_clients)
    return 1.001 * (privacy.clipping_norm + deviation * (math.sqrt(numbers) + 8))


def _epsilon(mu: float, delta: float) -> float:
    if not math.isfinite(mu):
        return math.inf
    if mu == 0 or _delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(STEPS_OF_BISECTION):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(mu, middle) > delta else (low, middle)
    return high


def _delta(mu: float, epsilon: float) -> float:
    """Return Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)."""
    first = math.exp(_log_normal(mu / 2 - epsilon / mu))
    if mu > LARGEST_EXACT_MU:
        return first
    return first - math.exp(epsilon + _log_normal(-mu / 2 - epsilon / mu))


def _log_normal(value: float) -> float:
    """Return the logarithm of the normal distribution function, also where the function itself is too small."""
    return float(torch.special.log_ndtr(torch.tensor(value, dtype=torch.float64)))
