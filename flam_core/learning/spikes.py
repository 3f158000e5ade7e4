"""Losses that are out of all proportion: a batch or a step that would spoil what was learnt."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_WINDOW, _ENOUGH = 100, 50
_TIMES_LARGEST = 3.0


class SpikeWatch:
    """Remembers the latest losses of a stage, and says when one leaps out of them.

    A spike is a loss above `factor` times their median and three times the largest of them: a loss that wanders, or
    that a new term of the objective lifts for all steps to come, is none.
    """

    def __init__(self, factor: float, losses: Sequence[float] = ()) -> None:
        """factor: 0 turns it off. losses: what `state` gave."""
        self._factor = factor
        self._losses: deque[float] = deque(losses, maxlen=_WINDOW)

    def spike(self, loss: float) -> bool:
        """Whether this loss is a spike; if it is not, it is remembered. One that is not finite always is."""
        if not math.isfinite(loss):
            return True
        known = self._losses
        if self._factor and len(known) >= _ENOUGH:
            bound = max(self._factor * abs(median(known)), _TIMES_LARGEST * max(map(abs, known)))
            if loss > bound:
                return True
        known.append(loss)
        return False

    def forget(self) -> None:
        """Another stage begins, whose losses are others."""
        self._losses.clear()

    def state(self) -> list[float]:
        """For a checkpoint."""
        return list(self._losses)
