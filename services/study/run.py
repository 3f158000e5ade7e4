"""Runs a study: data, tokenizers and trainings as Ray tasks, each done once and kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from flam_core.config import Config
from flam_core.config_json import given_values, to_dict
from flam_core.data.ingest import ingest_world
from flam_core.errors import FlamError
from flam_core.learning.collapse import CollapseWatch
from flam_core.model import Flam
from flam_core.saved_model import save_model, weights_to_bytes
from flam_core.worlds import make_world
from services.storage import resolve
from services.study.plan import FRAMES, Cell, StudySettings, data_digest, world_options
from services.study.tasks import (
    RETRIES,
    Results,
    as_they_finish,
    ray_for,
    refuse_broken,
    source_of,
    train_here,
    write_whole,
)
from services.training.held_out import evaluate_on

_TRAINING_FAILED = 5


def run_study(
    cells: Sequence[Cell], settings: StudySettings, say: Callable[[str], None] = print
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its result (`metrics`, `steps`, `seconds`, ...), as they finish; those done before come first.

    Results are kept in the folder and, beside the tables, in `settings.out`, from where they can be handed on: a
    training whose result is in either is not done again. A training whose numbers are not finite gives a result with
    `failed` and no metrics: that is a finding too. Raises EnvironmentFault or DataError for what lies outside.
    """
    folder = Path(settings.folder).absolute()
    results = Results(folder, Path(settings.out))
    waiting = []
    for cell in cells:
        if (result := results.find(cell.name)) is not None:
            yield cell, result
        else:
            waiting.append(cell)
    if not waiting:
        return
    say(f"{len(cells) - len(waiting)} of {len(cells)} trainings are done already, {len(waiting)} to go")
    with ray_for(settings.address, settings.tasks, gpus=settings.gpus):
        yield from _run(waiting, settings, folder, results, say)


def _run(
    waiting: Sequence[Cell], settings: StudySettings, folder: Path, results: Results, say: Callable[[str], None]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    remote: Any = ray.remote(num_cpus=1, num_gpus=settings.gpus, max_retries=RETRIES)
    make, fit, train = remote(make_data), remote(fit_tokenizer), remote(train_cell)
    data: dict[int, Any] = {}
    tokenizers: dict[Path, Any] = {}
    running: dict[Any, Cell] = {}
    for cell in waiting:
        if cell.agents not in data:
            data[cell.agents] = make.remote(settings, folder, cell.agents)
        place = tokenizer_place(settings, folder, cell)
        if place not in tokenizers:
            tokenizers[place] = fit.remote(settings, place, tokenizer_config(cell), data[cell.agents])
        running[train.remote(settings, folder, cell, tokenizers[place], data[cell.agents])] = cell
    for cell, result, left in as_they_finish(running):
        say(f"{cell.name}: {_said(result)}; {left}")
        results.show(cell.name, result)
        yield cell, result


def _said(result: dict[str, Any]) -> str:
    if "failed" in result:
        return result["failed"]
    metrics = result["metrics"]
    return f"{metrics['rollout/psnr@1']:.1f} dB after one step, {metrics['rollout/psnr@10']:.1f} after ten"


def make_data(settings: StudySettings, folder: Path, agents: int) -> str:
    """The data set of a world, made if it is not there; its path. A Ray task."""
    location = resolve(folder / "data" / _data_name(settings, agents))
    if not Path(location.path, "manifest.json").exists():
        world = make_world("grid", **world_options(settings, agents))
        ingest_world(world, location.fs, location.path, episodes=settings.episodes, frames=FRAMES)
    return location.path


def _data_name(settings: StudySettings, agents: int) -> str:
    return f"grid-agents{agents}-{data_digest(settings, agents)[:8]}"


def tokenizer_config(cell: Cell) -> Config:
    """The config whose stage 1 gives a cell its tokenizer: all models of a world and seed share it."""
    config = cell.config
    model = replace(type(config.model)(), temporal_window=config.model.temporal_window)
    return replace(config, model=model, loss=type(config.loss)(), slot_hold=0.0, latent_freeze=1.0, variant="flam")


def tokenizer_place(settings: StudySettings, folder: Path, cell: Cell) -> Path:
    """The file of a cell's tokenizer, named by all that it follows from."""
    config = cell.config
    data = _data_name(settings, cell.agents)
    stage = given_values(config.tokenizer_stage), given_values(config.tokenizer), config.seed, data
    digest = hashlib.sha256(json.dumps(stage, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "tokenizers" / f"agents{cell.agents}-seed{config.seed}-{digest}.safetensors"


def fit_tokenizer(settings: StudySettings, place: Path, config: Config, data: str) -> str:
    """Train stage 1, if it is not done; `place`, where the weights are. A Ray task."""
    if not place.exists():
        steps = config.tokenizer_stage.steps
        trainer = train_here(config, data, until=steps, name=place.stem, threads=settings.threads, gpus=settings.gpus)
        write_whole(place, weights_to_bytes(trainer.model.tokenizer))
    return str(place)


def train_cell(settings: StudySettings, folder: Path, cell: Cell, tokenizer: str, data: str) -> dict[str, Any]:
    """Train stage 2 on a given tokenizer and evaluate; the result, which is kept in the folder. A Ray task."""
    begun = time.monotonic()
    weights = Path(tokenizer).read_bytes()
    config = replace(
        cell.config,
        tokenizer_stage=replace(cell.config.tokenizer_stage, steps=0),
        tokenizer_sha256=hashlib.sha256(weights).hexdigest(),
    )
    result: dict[str, Any] = {"model": cell.model, "agents": cell.agents, "seed": cell.seed}
    watch = CollapseWatch(config)
    try:
        trainer = train_here(
            config,
            data,
            until=config.flam_stage.steps,
            name=cell.name,
            threads=settings.threads,
            gpus=settings.gpus,
            tokenizer=weights,
            watch=watch,
        )
        trained = time.monotonic()
        measured = evaluate_on(
            trainer.model.eval(), source_of(data), config.evaluation, config.seed, on_broken=refuse_broken
        )
    except FlamError as error:
        if error.exit_code != _TRAINING_FAILED:
            raise
        result["failed"] = str(error)
    else:
        result |= {"metrics": measured.metrics, "notes": list(measured.notes), "train_seconds": trained - begun}
        save_model(trainer.model.cpu(), folder / "models" / cell.name, f"# {cell.name}\n\nOne training of a study.\n")
        result |= {"weights": _count(trainer.model), "device": _device_name(trainer.device)}
    result["findings"] = sorted(watch.holding)
    result |= {"config": to_dict(config), "seconds": time.monotonic() - begun}
    Results(folder, Path(settings.out)).keep(cell.name, result)
    return result


def _count(model: Flam) -> dict[str, int]:
    parts = {"tokenizer": model.tokenizer, "dynamics": model.dynamics}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
