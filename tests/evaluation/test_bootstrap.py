"""Bootstrap intervals: coverage, edges, and agreement with scipy."""

from __future__ import annotations

import numpy as np
import pytest

from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    metric_difference,
    metric_interval,
    paired_difference,
)


def test_the_mean_and_n() -> None:
    interval = bootstrap_interval([0, 0, 0, 1])
    assert interval.mean == 0.25
    assert interval.n == 4
    # Of four draws none is the 1 with probability .75^4 = .316, and three or more are with .0508: 0 to .75.
    assert (interval.low, interval.high) == (0.0, 0.75)


def test_coverage_on_normal_data() -> None:
    generator = np.random.default_rng(11)
    trials = [bootstrap_interval(generator.normal(3.0, 2.0, 60).tolist(), resamples=1000, seed=s) for s in range(200)]
    covered = sum(interval.low <= 3.0 <= interval.high for interval in trials) / len(trials)
    assert 0.88 <= covered <= 1.0


def test_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(1.0, 80)
    interval = bootstrap_interval(values.tolist(), resamples=20_000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert interval.low == pytest.approx(theirs.low, abs=0.01)
    assert interval.high == pytest.approx(theirs.high, abs=0.01)


def test_agrees_with_the_normal_theory_at_other_levels() -> None:
    values = np.random.default_rng(4).normal(0, 1, 2000)
    interval = bootstrap_interval(values.tolist(), confidence=0.8, resamples=4000)
    half = 1.2816 * values.std() / np.sqrt(2000)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.4, 0.35, 0.8, 0.0, 0.65]
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, resamples=101, seed=5) != bootstrap_interval(values, resamples=101, seed=6)


def test_many_questions_are_drawn_in_parts() -> None:
    values = np.random.default_rng(5).normal(0, 1, 300_000)
    interval = bootstrap_interval(values.tolist(), resamples=40)
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low < 0.01


def test_equal_values_have_no_width() -> None:
    assert bootstrap_interval([0.1, 0.1, 0.1]) == Interval(0.1, 0.1, 0.1, 3)
    assert bootstrap_interval([0.7]) == Interval(0.7, 0.7, 0.7, 1)


def test_the_difference_is_paired() -> None:
    # The questions differ widely from each other, but every one gains about .1.
    generator = np.random.default_rng(6)
    before = generator.uniform(0, 1, 50)
    after = before + generator.normal(0.1, 0.01, 50)
    interval = paired_difference(before.tolist(), after.tolist())
    assert interval.mean == pytest.approx(0.1, abs=0.01)
    assert interval.high - interval.low < 0.01
    assert interval.excludes_zero()


def test_the_difference_of_geometric_means_is_paired() -> None:
    """Every question gains 1 %: so does every resample, if both sides draw the same questions."""
    before = np.random.default_rng(7).uniform(2, 50, 40)
    found = metric_difference("perplexity", before.tolist(), (before * 1.01).tolist(), seed=3)
    means = metric_interval("perplexity", before.tolist(), seed=3)
    assert found.mean == pytest.approx(0.01 * means.mean)
    assert (found.low, found.high) == pytest.approx((0.01 * means.low, 0.01 * means.high))


def test_the_difference_points_from_before_to_after() -> None:
    assert paired_difference([1.0, 1.0], [0.0, 0.0]) == Interval(-1.0, -1.0, -1.0, 2)
    assert not paired_difference([0.5, 0.5], [0.5, 0.5]).excludes_zero()


def test_unequal_lengths_are_an_error() -> None:
    with pytest.raises(DataError, match="2 values before and 1 after"):
        paired_difference([1.0, 0.0], [1.0])


def test_no_values_are_an_error() -> None:
    with pytest.raises(DataError, match="no values"):
        bootstrap_interval([])
    with pytest.raises(DataError, match="no values"):
        paired_difference([], [])


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(DataError, match="2 of 3 values are not finite, the first at position 1"):
        bootstrap_interval([0.0, float("nan"), float("inf")])
    with pytest.raises(DataError, match="not finite"):
        paired_difference([float("inf")], [float("inf")])


def test_settings_out_of_range_are_an_error() -> None:
    with pytest.raises(ConfigError, match="confidence"):
        bootstrap_interval([0.0, 1.0], confidence=95)
    with pytest.raises(ConfigError, match="resample"):
        bootstrap_interval([0.0, 1.0], resamples=0)
