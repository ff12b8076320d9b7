"""Bootstrap intervals of a mean, and of the mean difference between two runs on the same questions.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (the percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrag_cli.config.fields import GEOMETRIC
from fedrag_cli.errors import ConfigError, DataError

# Bounds the memory of the resampling to a few megabytes, however many questions and resamples there are.
_DRAWS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Args:
        mean: Mean of the values.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of values.
    """

    mean: float
    low: float
    high: float
    n: int

    def excludes_zero(self) -> bool:
        """Return whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Compute the percentile bootstrap interval of a mean.

    The questions are drawn with replacement `resamples` times; the interval spans the middle share `confidence` of the
    means of those draws. A single value, or values that are all equal, give an interval of width 0: such a sample says
    nothing about its spread.

    Args:
        values: One finite value a question, at least one.
        confidence: Level of the interval, in [0, 1].
        resamples: Number of resamples, at least 1.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        The mean and its interval.

    Raises:
        DataError: If there is no value, or one is not finite.
        ConfigError: If confidence or resamples are out of range.
    """
    _check_settings(confidence, resamples)
    sample = _finite_array(values)
    if np.all(sample == sample[0]):
        # The mean of equal floats may differ from them by rounding, which would be taken for a difference.
        constant = float(sample[0])
        return Interval(mean=constant, low=constant, high=constant, n=len(sample))
    means = _resampled_means(sample, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(sample.mean()), low=float(low), high=float(high), n=len(sample))


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Compute the bootstrap interval of the mean of after - before on the same questions.

    Args:
        before: One finite value a question.
        after: One finite value for each of the same questions, in the same order.
        confidence: Level of the interval, in [0, 1].
        resamples: Number of resamples, at least 1.
        seed: Seed of the draws.

    Returns:
        The mean difference and its interval; above 0 where `after` is larger.

    Raises:
        DataError: If the lengths differ, there is no value, or one is not finite.
        ConfigError: If confidence or resamples are out of range.
    """
    first, second = _paired(before, after)
    return bootstrap_interval((second - first).tolist(), confidence, resamples, seed)


def metric_mean(metric: str, values: Sequence[float]) -> float:
    """Return the mean of a metric over the questions: geometric for perplexity, arithmetic for all others."""
    sample = _finite_array(values)
    return float(np.exp(np.log(sample).mean()) if metric in GEOMETRIC else sample.mean())


def metric_interval(
    metric: str, values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Compute the interval of a metric's mean; see `bootstrap_interval` and `metric_mean`."""
    if metric not in GEOMETRIC:
        return bootstrap_interval(values, confidence, resamples, seed)
    logs = bootstrap_interval(np.log(_finite_array(values)).tolist(), confidence, resamples, seed)
    mean, low, high = (float(np.exp(value)) for value in (logs.mean, logs.low, logs.high))
    return Interval(mean, low, high, logs.n)


def metric_difference(
    metric: str,
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Compute the interval of a metric's mean after less that before; see `paired_difference` and `metric_mean`."""
    if metric not in GEOMETRIC or list(before) == list(after):
        return paired_difference(before, after, confidence, resamples, seed)
    _check_settings(confidence, resamples)
    # The same seed draws the same questions on both sides.
    means = [np.exp(_resampled_means(np.log(side), resamples, seed)) for side in _paired(before, after)]
    low, high = np.quantile(means[1] - means[0], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(metric_mean(metric, after) - metric_mean(metric, before), float(low), float(high), len(before))


def _check_settings(confidence: float, resamples: int) -> None:
    if not 0 <= confidence <= 1:
        raise ConfigError(f"The confidence of an interval is between 0 and 1, not {confidence}.")
    if resamples < 1:
        raise ConfigError(f"A bootstrap needs at least 1 resample, not {resamples}.")


def _paired(before: Sequence[float], after: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(before) != len(after):
        raise DataError(
            f"There are {len(before)} values before and {len(after)} after; a paired comparison needs as many of each.",
            "Evaluate both on the same questions.",
        )
    return _finite_array(before), _finite_array(after)


def _finite_array(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise DataError("There are no values to take a mean of.", "Evaluate at least one question.")
    broken = np.flatnonzero(~np.isfinite(array))
    if broken.size:
        raise DataError(
            f"{broken.size} of {array.size} values are not finite, the first at position {broken[0]}.",
            "A mean needs finite values; look at that question's answer and scores.",
        )
    return array


def _resampled_means(sample: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    rows_at_once = max(1, _DRAWS_AT_ONCE // len(sample))
    means = np.empty(resamples)
    for start in range(0, resamples, rows_at_once):
        stop = min(start + rows_at_once, resamples)
        draws = generator.integers(0, len(sample), size=(stop - start, len(sample)))
        means[start:stop] = sample[draws].mean(axis=1)
    return means
