"""The driver's notes of its trials: what they showed, how they ended, what is written down of that."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial as TuneTrial

from flam_core.errors import FlamError, unpack
from services.storage import Location
from services.sweep.actor import STEP
from services.sweep.trials import ASHA, Look, Record, Trial, write_record
from services.training.lineage import seconds_used


@dataclass
class Notes:
    """Of a trial that goes on."""

    run_id: str = ""
    looks: list[Look] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    """The result that said `done`."""

    @property
    def step(self) -> int:
        """Of the newest look; 0 before the first."""
        return self.looks[-1].step if self.looks else 0


class Recorder(Callback):
    """Takes down results, and writes a trial's record when it has ended."""

    def __init__(self, sweep: Location, storage: Location, steps: int, say: Callable[[], None]) -> None:
        """steps: of a whole trial. say: called when there is something new to show."""
        self._sweep, self._storage, self._steps, self._say = sweep, storage, steps, say
        self.notes: dict[str, Notes] = {}
        """By Tune's names for trials."""
        self.refused: FlamError | None = None
        """What no trial of the sweep could do better."""
        self.crashed = ""
        """What ended the watch over a trial, whose own process may be well."""
        self.stopped: Collection[str] = ()
        """Tune's names of the trials that the scheduler stopped."""

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """A look at held-out clips, an end, or a word that the trial goes on."""
        notes = self.notes.setdefault(trial.trial_id, Notes())
        notes.run_id = result.get("run_id") or notes.run_id
        if "look" in result:
            notes.looks.append(Look(result[STEP], result["look"]))
        if any(key in result for key in ("metrics", "collapsed", "failed", "refused")):
            notes.end = result
        if "refused" in result:
            self.refused = unpack(result["refused"])
        self._say()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its actor failed more often than Tune starts it again."""
        self.crashed = str(trial.get_error() or "its node was lost").strip().splitlines()[-1]

    def ended(self, tune_id: str, trial: Trial) -> Record | None:
        """Write the record of a trial that has ended; None if it was only interrupted."""
        notes = self.notes.pop(tune_id, Notes())
        stopped_by = self._reason(tune_id, notes)
        if "metrics" not in notes.end and not stopped_by:
            return None
        last = notes.looks[-1] if notes.looks else Look(0, {})
        record = Record(
            name=trial.name,
            run_id=notes.run_id,
            stopped_by=stopped_by or None,
            metrics={**{k: v for k, v in last.metrics.items() if k.startswith("speed/")}, **notes.end["metrics"]}
            if "metrics" in notes.end
            else dict(last.metrics),
            seconds=seconds_used(self._storage / notes.run_id)[0],
            steps=self._steps if "metrics" in notes.end else last.step,
            looks=tuple(notes.looks),
        )
        write_record(self._sweep, record)
        self._say()
        return record

    def _reason(self, tune_id: str, notes: Notes) -> str:
        if "failed" in notes.end:
            return f"failed: {notes.end['failed']}"
        if "collapsed" in notes.end:
            return notes.end["collapsed"]
        return ASHA if tune_id in self.stopped and "metrics" not in notes.end else ""


class Hopeless(Stopper):
    """Ends the sweep once a trial was refused for what no other could do better."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped by this."""
        return False

    def stop_all(self) -> bool:
        """Whether it is."""
        return self._recorder.refused is not None
