"""What a sweep is: its config, space, data and name, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from flam_core.config import Config
from flam_core.config_evaluation import Measured
from flam_core.config_json import canonical_json, to_dict
from flam_core.errors import SettingsError
from services.storage import Location, resolve
from services.sweep.search import Objective, objectives
from services.sweep.settings import SweepSettings
from services.sweep.space import Levels, Point, Space, tokenizers
from services.sweep.trials import Record, Trial, read_record
from services.training.data import (
    check_frame_size,
    data_sha256,
    has_positions,
    open_sources,
    parse_data,
    verify_sources,
)
from services.training.prepare import at_home, run_id_of
from services.training.settings import TrainSettings


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be started: everything fits, nothing is running yet."""

    base: Config
    """The config that points change: what each trial is measured on while it trains is set."""
    space: Space
    settings: SweepSettings
    training: TrainSettings
    goals: tuple[Objective, ...]
    points: tuple[Point, ...]
    """All that a grid has; those that TPE may choose from."""
    data_name: str
    data_sha256: str
    folder: Location
    """`STORAGE/sweeps/SWEEP_ID`."""
    name: str
    """The sweep's id."""
    tokenizer_runs: Mapping[Levels, str]
    """Ids of the runs that train the tokenizers."""

    @property
    def trials(self) -> list[Trial]:
        """Of a grid, in the order in which they are given out."""
        return [Trial(point, self.base.seed + i) for point in self.points for i in range(self.settings.seeds)]

    @property
    def total(self) -> int:
        """How many trials there will be."""
        return (self.settings.points or len(self.points)) * self.settings.seeds

    @property
    def storage(self) -> Location:
        """Where the runs are."""
        return resolve(at_home(self.training.storage), check=False)

    def record(self, trial: Trial) -> Record | None:
        """Of a trial that has ended."""
        return read_record(self.folder, trial)

    def tokenizer_config(self, levels: Levels) -> Config:
        """Of the run that trains the tokenizer."""
        return dict(tokenizers(self.points, self._own))[levels]

    @property
    def _own(self) -> Config:
        return replace(self.base, evaluation=replace(self.base.evaluation, during=()))


def prepare_sweep(base: Config, space: Space, settings: SweepSettings, training: TrainSettings) -> Sweep:
    """Check that all points can be trained on the data. Raises FlamError with the reason if not."""
    _refuse_what_is_the_sweeps(base, training)
    storage = resolve(at_home(training.storage))
    places = [(at_home(place), weight) for place, weight in parse_data(training.data)]
    sources = open_sources(places, max_bad_share=training.max_bad_share)
    own = replace(base, evaluation=replace(base.evaluation, during=()))
    points = tuple(space.points(own))
    for point in points:
        check_frame_size(sources, point.config(own, own.seed))
    if training.verify:
        verify_sources(sources)
    digest, truth = data_sha256(sources), has_positions(sources)
    measured = _watched(own, settings, truth=truth)
    chosen = replace(settings, at_a_time=0, optuna=None)
    content = [to_dict(measured), asdict(space), asdict(chosen), digest, training.data]
    identity = hashlib.sha256(canonical_json(json.loads(json.dumps(content))).encode()).hexdigest()[:8]
    name = f"sweep-{base.recipe}-{identity}"
    runs = {levels: run_id_of(config, digest) for levels, config in tokenizers(points, own)}
    return Sweep(
        measured,
        space,
        settings,
        training,
        objectives(truth=truth, horizon=base.evaluation.horizon),
        points,
        "-".join(source.manifest.name for source in sources),
        digest,
        storage / "sweeps" / name,
        name,
        runs,
    )


def _refuse_what_is_the_sweeps(base: Config, training: TrainSettings) -> None:
    for name, value in (("resume", training.resume), ("tokenizer_from", training.tokenizer_from)):
        if value is not None:
            raise SettingsError(f"--{name} in a sweep, which has many runs", fix=f"Leave --{name} out.")
    if training.fresh:
        raise SettingsError("--fresh in a sweep", fix="Change a setting, or give another --storage, to do it anew.")
    if training.chaos:
        raise SettingsError("--chaos in a sweep", fix="Leave it out: it is for single runs.")
    if base.variant != "flam":
        raise SettingsError(
            f"--variant {base.variant} in a sweep over factors and codebooks",
            fix="Leave it out; jobs/study.py compares variants.",
        )


def _watched(config: Config, settings: SweepSettings, *, truth: bool) -> Config:
    """With looks at held-out clips while it trains, of all that trials are compared by."""
    every = max(1, config.flam_stage.steps // settings.evaluations)
    names: tuple[Measured, ...] = ("rollout", "usage", *(("dci", "leakage") if truth else ()))
    evaluation = replace(config.evaluation, during=tuple((name, every) for name in names))
    return replace(config, evaluation=evaluation)
