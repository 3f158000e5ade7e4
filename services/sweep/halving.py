"""ASHA that remembers: Ray Tune's scheduler, told again what trials of an earlier driver had shown."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from services.sweep.actor import SCORE, STEP
from services.sweep.settings import SweepSettings
from services.sweep.trials import Record


class Halving(AsyncHyperBandScheduler):
    """Of the trials that come to a milestone the best 1 / reduction go on (Li et al. 2020).

    `stopped` names, by Tune's ids, those that it stopped.
    """

    def __init__(self, settings: SweepSettings, steps: int, metric: str, records: Iterable[Record]) -> None:
        """steps: of a whole trial. metric: what SCORE holds, in a record's looks."""
        super().__init__(
            time_attr=STEP,
            metric=SCORE,
            mode="max",
            max_t=steps + 1,  # the last look is no milestone: there is nothing left to save
            grace_period=max(1, round(settings.grace * steps)),
            reduction_factor=settings.reduction,
        )
        self.stopped: set[str] = set()
        for record in records:
            self._tell(record, metric)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """As Tune's, with a note of those that are stopped."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision

    def _tell(self, record: Record, metric: str) -> None:
        """Only the trial's name matters to this scheduler."""
        known: Any = SimpleNamespace(trial_id=record.name)
        self.on_trial_add(None, known)  # pyright: ignore[reportArgumentType]
        for look in record.looks:
            if metric in look.metrics:
                super().on_trial_result(None, known, {STEP: look.step, SCORE: look.metrics[metric]})  # pyright: ignore[reportArgumentType]
        self.on_trial_remove(None, known)  # pyright: ignore[reportArgumentType]


class NoHalving(FIFOScheduler):
    """All trials go on to their end."""

    stopped: frozenset[str] = frozenset()


def scheduler(settings: SweepSettings, steps: int, metric: str, records: Iterable[Record]) -> Halving | NoHalving:
    """What the settings ask for."""
    return NoHalving() if settings.reduction == 1 else Halving(settings, steps, metric, records)
