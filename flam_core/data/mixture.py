"""Several data sets in one sample order, each with its share of every batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flam_core.data.order import ClipKey, SampleOrder, Window
from flam_core.errors import SettingsError


class Mixture:
    """Global batches that each of the `orders` fills to its share: as many windows as its own batch has.

    So all that holds for the order of one data set holds for each of a mixture: its windows come in the same order
    whatever stands beside it, every one once in each of its epochs. A single data set is a mixture of one.
    """

    def __init__(self, orders: Sequence[SampleOrder]) -> None:
        self.orders = tuple(orders)
        self.batch_size = sum(order.batch_size for order in self.orders)
        # Data sets alternate within a batch, so that each rank, which takes neighbours, gets of all.
        places = [
            ((j + 0.5) / order.batch_size, k) for k, order in enumerate(self.orders) for j in range(order.batch_size)
        ]
        owners = np.array([owner for _, owner in sorted(places)])
        self.positions = tuple(np.flatnonzero(owners == k) for k in range(len(self.orders)))
        """For each data set, the places of its windows in the batch, in order."""

    def batch(self, n: int) -> list[Window]:
        """The windows of global batch n >= 0, in order."""
        return self.part(n, slice(0, self.batch_size))

    def part(self, n: int, places: slice) -> list[Window]:
        """The windows at `places` of global batch n, in order."""
        return self.parts(range(n, n + 1), places)[0]

    def parts(self, batches: range, places: slice) -> list[list[Window]]:
        """The windows at `places` of each of the global batches, in order."""
        width = places.stop - places.start
        found: list[list[Window]] = [[_NONE] * width for _ in batches]
        for order, positions in zip(self.orders, self.positions, strict=True):
            first, end = np.searchsorted(positions, [places.start, places.stop]).tolist()
            if first == end:
                continue
            offsets = np.arange(batches.start, batches.stop)[:, None] * order.batch_size
            windows = iter(order.windows_at((offsets + np.arange(first, end)).ravel()))
            here = (positions[first:end] - places.start).tolist()
            for batch in found:
                for place in here:
                    batch[place] = next(windows)
        return found


_NONE = Window(ClipKey(-1, "", -1, -1), -1)


def shares(weights: Sequence[float], batch: int) -> list[int]:
    """Windows of each data set in a batch: in proportion to the weights, rounded so that they add up to `batch`.

    Raises SettingsError if a weight is not positive, or too small for a window in every batch.
    """
    if min(weights) <= 0:
        raise SettingsError(f"weights of data sets are {list(weights)}", fix="Each must be above 0.")
    exact = np.array(weights, dtype=np.float64) / sum(weights) * batch
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: batch - int(counts.sum())]:
        counts[place] += 1
    if counts.min() < 1:
        raise SettingsError(
            f"a batch of {batch} windows holds none of a data set with weight {weights[int(counts.argmin())]:g} "
            f"among {list(weights)}",
            fix="Raise its weight or batch_clips.",
        )
    return counts.tolist()
