"""Which trial comes next: an Optuna study, as Ray Tune asks for it.

The study lies in Optuna's own storage, so it outlives the driver; what trials gave lies in the sweep's folder. A
point's trial in the study ends when the trainings with all its seeds have, with the mean of what they gave.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState
from ray.tune.search import Searcher
from sqlalchemy.exc import ArgumentError

from flam_core.config import Config
from flam_core.errors import EnvironmentFault, SettingsError
from services.sweep.settings import SweepSettings
from services.sweep.space import Point, Space
from services.sweep.trials import Record, Trial

Direction = Literal["maximize", "minimize"]
_SEPARATOR = "x"
_MANY_BITS = 1e6


@dataclass(frozen=True)
class Objective:
    """A metric that the study is about."""

    metric: str
    """As in docs/metrics.md, or `speed/frames_per_second`."""
    direction: Direction
    title: str
    worst: float
    """What counts where it could not be measured: no latent action that changes anything leaves leakage undefined."""


def objectives(*, truth: bool, horizon: int) -> tuple[Objective, ...]:
    """What a sweep is about: how well it predicts, how well it factors, what it takes.

    truth: whether the data set knows where its entities are.
    """
    factoring = (
        (Objective("dci/i", "maximize", "DCI informativeness", 0.0), Objective("leakage", "minimize", "leakage", 1.0))
        if truth
        else (
            Objective(f"delta_psnr/shuffled@{horizon}", "maximize", f"delta-PSNR at step {horizon}, dB", 0.0),
            Objective("actions/usage", "maximize", "use of codes or dimensions", 0.0),
        )
    )
    return (
        Objective(f"rollout/psnr@{horizon}", "maximize", f"PSNR at step {horizon}, dB", 0.0),
        *factoring,
        Objective("actions/bits", "minimize", "bits per step", _MANY_BITS),
        Objective("speed/frames_per_second", "maximize", "frames/s while training", 0.0),
    )


def open_study(
    storage: str, name: str, settings: SweepSettings, space: Space, base: Config, goals: Sequence[Objective]
) -> optuna.Study:
    """Create the study, with all points of a grid waiting in it, or open the one there is.

    Raises EnvironmentFault if Optuna's storage does not answer, SettingsError if its address is none.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=optuna.samplers.TPESampler(seed=base.seed, multivariate=True),
            directions=[goal.direction for goal in goals],
            load_if_exists=True,
        )
        study.set_metric_names([goal.metric for goal in goals])
        if settings.search == "grid":
            for point in space.points(base):
                # Not again if it waits, runs or is done: a driver that was killed here goes on with the rest.
                study.enqueue_trial(_parameters(point), skip_if_exists=True)
    except (ValueError, ImportError, ArgumentError) as error:
        raise SettingsError(
            f"--optuna {storage} is not a storage of Optuna's: {str(error).splitlines()[0]}",
            fix="Give sqlite:///file or postgresql://user@host/database.",
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("sqlalchemy", "optuna", "redis"):
            raise
        raise EnvironmentFault(
            f"Optuna's storage {storage} does not answer: {str(error).splitlines()[0]}", fix="Check --optuna."
        ) from error
    return study


@dataclass
class _Open:
    """A point whose seeds are not all done."""

    number: int
    waiting: set[str]
    values: list[dict[str, float]]
    failed: bool = False


class StudySearch(Searcher):
    """Gives out the trials of a study. Tune's config of a trial is what `make` returns."""

    def __init__(
        self,
        study: optuna.Study,
        settings: SweepSettings,
        space: Space,
        base: Config,
        goals: Sequence[Objective],
        record_of: Callable[[Trial], Record | None],
        make: Callable[[Trial], dict[str, Any]],
        write: Callable[[str, Trial], Record | None],
    ) -> None:
        """record_of: of a trial that had ended before. make: what the trial's actor is given. write: writes the record
        of the trial of this name of Tune's, unless it was only interrupted."""
        super().__init__(metric=goals[0].metric, mode="max")
        self._study, self._settings, self._space, self._base = study, settings, space, base
        self._goals, self._record_of, self._make, self._write = goals, record_of, make, write
        self._distributions = _distributions(space, base)
        self._open: dict[int, _Open] = {}
        self._of: dict[str, int] = {}
        self._queue: deque[Trial] = deque()
        self.running: dict[str, Trial] = {}
        """Of those given out, by Tune's name for them."""
        everything = (Trial(point, base.seed + i) for point in space.points(base) for i in range(settings.seeds))
        self.records = {one.name: record for one in everything if (record := record_of(one)) is not None}
        """Of the trials that have ended, by name."""
        # What a driver that was killed had asked for comes first.
        for unfinished in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # As `ask` leaves it: what was written down of it stays, and a driver killed within `ask` left the rest.
            asked = optuna.trial.Trial(study, unfinished._trial_id)
            self._begin(asked.number, _suggested(asked, self._distributions))

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; FINISHED when there is none left."""
        while not self._queue:
            if not self._ask():
                return Searcher.FINISHED
        trial = self._queue.popleft()
        self.running[trial_id] = trial
        return self._make(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Write its record, and tell the study if that was the last of its point."""
        trial = self.running.pop(trial_id, None)
        record = None if trial is None else self._write(trial_id, trial)
        if record is not None:
            self._ended(record)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is its own."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is its own."""

    @property
    def finished(self) -> bool:
        """Whether no trial is left."""
        return not self._open and not self._more()

    def _more(self) -> bool:
        if self._settings.search == "grid":
            return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        return len(self._study.get_trials(deepcopy=False)) < self._settings.points

    def _ask(self) -> bool:
        """Take another point from the study; whether there was one."""
        if not self._more():
            return False
        asked = self._study.ask()
        self._begin(asked.number, _suggested(asked, self._distributions))
        return True

    def _begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        point = _point(self._space, self._base, parameters)
        trials = [Trial(point, self._base.seed + i) for i in range(self._settings.seeds)]
        self._open[number] = _Open(number, {trial.name for trial in trials}, [])
        for trial in trials:
            if trial.name in self._of and self._of[trial.name] in self._open:
                continue  # TPE asks for the same point again while it runs: one training is enough for both
            self._of[trial.name] = number
            if (record := self._record_of(trial)) is not None:
                self._ended(record)
            else:
                self._queue.append(trial)

    def _ended(self, record: Record) -> None:
        self.records[record.name] = record
        for one in list(self._open.values()):
            if record.name not in one.waiting:
                continue
            one.waiting.discard(record.name)
            if self._goals[0].metric in record.metrics:
                one.values.append({goal.metric: record.metrics.get(goal.metric, goal.worst) for goal in self._goals})
            if not one.waiting:
                del self._open[one.number]
                self._tell(one)

    def _tell(self, one: _Open) -> None:
        """A point none of whose trainings was measured has failed."""
        if not one.values:
            self._study.tell(one.number, state=TrialState.FAIL)
            return
        self._study.tell(one.number, [mean(found[goal.metric] for found in one.values) for goal in self._goals])


def _distributions(space: Space, base: Config) -> dict[str, CategoricalDistribution]:
    """Of each setting with values of its own, those. FSQ levels are words, as Optuna stores no tuples."""
    return {
        name: CategoricalDistribution([_word(value) for value in values])
        for name, values in space.choices(base).items()
        if values
    }


def _suggested(asked: optuna.trial.Trial, distributions: Mapping[str, CategoricalDistribution]) -> dict[str, Any]:
    """The value of each setting, from the storage where it is there already."""
    return {name: asked.suggest_categorical(name, one.choices) for name, one in distributions.items()}


def _word(value: Any) -> Any:
    return _SEPARATOR.join(map(str, value)) if isinstance(value, tuple) else value


def _parameters(point: Point) -> dict[str, Any]:
    return {name: _word(value) for name, value in point.values.items()}


def _point(space: Space, base: Config, parameters: Mapping[str, Any]) -> Point:
    fsq = tuple(int(level) for level in str(parameters["fsq"]).split(_SEPARATOR))
    return space.point(base, **{**parameters, "fsq": fsq})
