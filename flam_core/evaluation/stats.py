"""Means with their spread: standard error and 95 % bootstrap interval, over episodes or over seeds.

Clips of one episode are alike, so episodes are resampled as a whole (cluster bootstrap): resampling clips would give
errors that are too small. One `Bootstrap` draws the same episodes for every statistic, so that a difference of two is
a paired one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 1000
"""Bootstrap resamples behind each standard error and interval."""
LEVEL = 0.95
"""Share of the resamples that lie within the interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its spread over n independent units (episodes or seeds).

    se: standard deviation over the resamples. low, high: the interval that holds 95 % of them (percentiles). All three
    are None for n = 1, which says nothing of the spread.
    """

    mean: float
    se: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def row(self) -> dict[str, float | int | None]:
        """As plain JSON: mean, se, low, high, n."""
        return asdict(self)


class Bootstrap:
    """Resamples of whole clusters. Row 0 of every result is the statistic of the data themselves."""

    def __init__(self, clusters: Sequence[Hashable], seed: int, resamples: int = RESAMPLES) -> None:
        """clusters: of each sample, N of them, the cluster it belongs to. Equal seeds draw equal clusters."""
        numbers = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        self.n = len(numbers)
        self._of = np.array([numbers[name] for name in clusters], dtype=np.int64)
        drawn = np.random.default_rng((seed, 1)).multinomial(self.n, [1 / self.n] * self.n, size=resamples)
        self._weights = np.concatenate([np.ones((1, self.n)), drawn])

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray | float = 1.0) -> np.ndarray:
        """Sum of the numerators [N, ...] over the sum of the denominators (same shape) of each resample.

        Returns float64 [1 + resamples, ...]; NaN where the denominators sum to zero. With denominator 1 it is the mean.
        """
        top = np.asarray(numerator, dtype=np.float64)
        bottom = np.broadcast_to(np.asarray(denominator, dtype=np.float64), top.shape)
        above, below = self.total(top), self.total(bottom)
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums float64 [1 + resamples, ...] of values [N, ...] over the samples of each resample."""
        return np.tensordot(self._weights, self._by_cluster(values), axes=1)

    def estimate(self, draws: np.ndarray) -> Estimate:
        """The estimate of a statistic from its draws [1 + resamples], as `ratio` gives them, transformed at will.

        Resamples that are not finite are left out.
        """
        mean, rest = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
        if self.n < 2 or len(rest) < 2:
            return Estimate(mean, None, None, None, self.n)
        low, high = np.quantile(rest, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(mean, float(rest.std(ddof=1)), float(low), float(high), self.n)

    def _by_cluster(self, values: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.n, *values.shape[1:]))
        np.add.at(sums, self._of, values)
        return sums


def over_seeds(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of one number a seed, with the usual standard error (deviation / sqrt(n)) and a bootstrap interval.

    The interval of three seeds can reach no further than their least and largest value, and is too narrow for it.
    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    found = np.asarray(values, dtype=np.float64)
    bootstrap = Bootstrap(range(len(found)), seed)
    estimate = bootstrap.estimate(bootstrap.ratio(found))
    if estimate.se is None:
        return estimate
    error = float(found.std(ddof=1) / np.sqrt(len(found)))
    return Estimate(estimate.mean, error, estimate.low, estimate.high, estimate.n)


def error_key(key: str) -> str:
    """The key of a number's standard error: `rollout/psnr@3` -> `rollout/psnr_se@3`, `leakage` -> `leakage_se`."""
    name, at, where = key.partition("@")
    return f"{name}_se{at}{where}"


def flat(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """The means and, at `error_key`, the standard errors that there are."""
    metrics = {}
    for key, estimate in estimates.items():
        metrics[key] = estimate.mean
        if estimate.se is not None:
            metrics[error_key(key)] = estimate.se
    return metrics
