"""What a run is: its config, data, folder and name, checked before anything starts."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from flam_core.config import Config
from flam_core.config_json import canonical_json, differing_fields, to_dict
from flam_core.data.manifest import Manifest
from flam_core.errors import SettingsError
from flam_core.evaluation.perceptual import check_weights
from flam_core.recipes import get_recipe
from services.feed import FeedPlan, FeedSource
from services.storage import Location, resolve
from services.training import checkpoints
from services.training.data import check_frame_size, data_sha256, open_sources, parse_data, stage_plans, verify_sources
from services.training.elastic import parse_workers
from services.training.settings import TrainSettings, settle


@dataclass(frozen=True)
class Prepared:
    """A run that can be started: settings and data fit, nothing is running yet."""

    config: Config
    settings: TrainSettings
    sources: tuple[FeedSource, ...]
    run: Location
    run_id: str
    plan: FeedPlan
    tokenizer: bytes | None
    """Weights of a tokenizer that was given."""

    @property
    def manifest(self) -> Manifest:
        """Of the data set that the model is evaluated on: the first."""
        return self.sources[0].manifest

    @property
    def data(self) -> Location:
        """Where that data set lies."""
        return self.sources[0].data

    @property
    def data_name(self) -> str:
        """Name of the data, and so of the model: flam-NAME."""
        return "-".join(source.manifest.name for source in self.sources)


def home() -> Path:
    """The folder that relative default places are in: FLAM_HOME, else the current one."""
    return Path(os.environ.get("FLAM_HOME", ".")).absolute()


def prepare(config: Config, settings: TrainSettings) -> Prepared:
    """Check settings against data and storage. Raises FlamError with the reason if they do not fit."""
    storage = resolve(at_home(settings.storage))
    places = [(at_home(place), weight) for place, weight in parse_data(settings.data)]
    sources = open_sources(places, max_bad_share=settings.max_bad_share)
    config, tokenizer = settle(config, settings, sources)
    if settings.resume:
        config = _resumed_config(config, checkpoints.stored_config(storage / settings.resume), settings.resume)
    check_frame_size(sources, config)
    stages = stage_plans(config)
    workers = parse_workers(settings.workers)
    plan = FeedPlan(sources, stages, config.seed, workers.most, settings.decode, truth=config.model.latent == "true")
    plan.mixtures()
    check_weights(config.evaluation)
    if settings.verify:
        verify_sources(sources)
    run_id = run_id_of(config, data_sha256(sources))
    if settings.fresh:
        run_id = f"{run_id}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_id = settings.resume or run_id
    return Prepared(config, settings, sources, storage / run_id, run_id, plan, tokenizer)


def _resumed_config(asked: Config, stored: Config, run_id: str) -> Config:
    """The config of the run to resume. Raises SettingsError if a setting that was given differs from it."""
    given = {field.split(" ")[0] for field in differing_fields(get_recipe(asked.recipe), asked)}
    differing = [field for field in differing_fields(stored, asked) if field.split(" ")[0] in {*given, "recipe"}]
    if differing:
        raise SettingsError(
            f"run {run_id} was started with other settings: {', '.join(differing)}",
            fix="Leave them out to resume it as it is, or leave out --resume for a run of its own.",
        )
    return stored


def run_id_of(config: Config, data: str) -> str:
    """The run that this config gives on the data of this sha256 (`data_sha256`)."""
    content = canonical_json([to_dict(config), data, config.seed])
    return f"{config.recipe}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def at_home(address: str) -> str:
    """An address as it is, a relative path from `home()`."""
    return address if "://" in address else str(home() / Path(address).expanduser())


def as_given(source: FeedSource, *, alone: bool) -> str:
    """A data set as `--data` names it."""
    return source.data.uri if alone else f"{source.data.uri}@{source.weight:g}"
