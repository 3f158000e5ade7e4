"""Estimates: what bootstrap and standard error must be where they are known by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flam_core.evaluation.stats import Bootstrap, Estimate, error_key, flat, over_seeds


def test_mean_error_and_interval_of_normal_numbers() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    bootstrap = Bootstrap(range(400), seed=0)
    estimate = bootstrap.estimate(bootstrap.ratio(values))
    error = values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(error, rel=0.1)
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03
    )
    assert estimate.n == 400


def test_clips_of_an_episode_are_resampled_together() -> None:
    """Ten copies of each episode's number add nothing: the error is that of the episodes, not a third of it."""
    values = np.random.default_rng(1).normal(size=50)
    once, copied = Bootstrap(range(50), seed=3), Bootstrap(np.repeat(np.arange(50), 10).tolist(), seed=3)
    first, second = once.estimate(once.ratio(values)), copied.estimate(copied.ratio(values.repeat(10)))
    assert second.row == pytest.approx(first.row)
    assert second.n == 50


def test_ratio_pools_before_dividing_and_pairs_statistics() -> None:
    bootstrap = Bootstrap(["a", "b", "c"], seed=0)
    top, bottom = np.array([1.0, 0.0, 8.0]), np.array([1.0, 0.0, 2.0])
    draws = bootstrap.ratio(top, bottom)
    assert draws[0] == 3.0
    assert np.isnan(draws).any()  # resamples of "b" alone
    estimate = bootstrap.estimate(draws)
    assert (estimate.low, estimate.high) == (1.0, 4.0)
    shifted = bootstrap.estimate(bootstrap.ratio(top + 2) - bootstrap.ratio(top))
    assert (shifted.mean, shifted.se) == pytest.approx((2.0, 0.0), abs=1e-12)


def test_equal_seeds_draw_equal_resamples() -> None:
    values = np.arange(9.0)
    first, second, other = (Bootstrap(range(9), seed).ratio(values) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_one_unit_has_no_spread() -> None:
    bootstrap = Bootstrap(["only"] * 4, seed=0)
    estimate = bootstrap.estimate(bootstrap.ratio(np.arange(4.0)))
    assert estimate == Estimate(1.5, None, None, None, 1)
    assert json.loads(json.dumps(estimate.row)) == {"mean": 1.5, "se": None, "low": None, "high": None, "n": 1}
    assert flat({"x": estimate}) == {"x": 1.5}


def test_over_seeds() -> None:
    estimate = over_seeds([1.0, 2.0, 6.0])
    assert (estimate.mean, estimate.n) == (3.0, 3)
    assert estimate.se == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert (estimate.low, estimate.high) == (1.0, 6.0)
    assert over_seeds([2.0]) == Estimate(2.0, None, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        over_seeds([])


def test_keys_of_errors() -> None:
    assert error_key("rollout/psnr@3") == "rollout/psnr_se@3"
    assert error_key("leakage") == "leakage_se"
    assert flat({"a@1": Estimate(1.0, 0.5, 0.0, 2.0, 4)}) == {"a@1": 1.0, "a_se@1": 0.5}
