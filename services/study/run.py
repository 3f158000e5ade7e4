"""Runs a study: data, tokenizers and trainings as Ray tasks, each done once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
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
from flam_core.data.manifest import read_manifest
from flam_core.errors import FlamError
from flam_core.learning.trainer import Trainer
from flam_core.model import Flam
from flam_core.saved_model import save_model, weights_to_bytes
from flam_core.worlds import make_world
from services.feed import Assembler, FeedPlan, FeedSource, local_steps
from services.feed.prefetch import memory_for
from services.storage import resolve
from services.study.plan import FRAMES, Cell, StudySettings, data_digest, world_options
from services.training.data import stage_plans
from services.training.held_out import evaluate_on

_SAY_EVERY = 200


def run_study(
    cells: Sequence[Cell], settings: StudySettings, say: Callable[[str], None] = print
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its result (`metrics`, `steps`, `seconds`, ...), as they finish; those done before come first.

    Results are kept in the folder and, beside the tables, in `settings.out`, from where they can be handed on: a
    training whose result is in either is not done again. A training whose numbers are not finite gives a result with
    `failed` and no metrics: that is a finding too. Raises EnvironmentFault or DataError for what lies outside.
    """
    folder = Path(settings.folder).absolute()
    waiting = []
    for cell in cells:
        known = (folder / "cells" / f"{cell.name}.json", _kept(settings, cell))
        place = next((place for place in known if place.exists()), None)
        if place is not None:
            result = json.loads(place.read_text())
            _keep(settings, cell, result)
            yield cell, result
        else:
            waiting.append(cell)
    if not waiting:
        return
    say(f"{len(cells) - len(waiting)} of {len(cells)} trainings are done already, {len(waiting)} to go")
    address = settings.address or os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {} if address else {"num_cpus": settings.tasks, "object_store_memory": 128 << 20}
        ray.init(address=address or "local", logging_level=logging.WARNING, **local)
    try:
        yield from _run(waiting, settings, folder, say)
    finally:
        if started:
            ray.shutdown()


def _run(
    waiting: Sequence[Cell], settings: StudySettings, folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    remote: Any = ray.remote(num_cpus=1, num_gpus=settings.gpus, max_retries=0)
    make, fit, train = remote(make_data), remote(fit_tokenizer), remote(train_cell)
    data: dict[int, Any] = {}
    tokenizers: dict[str, Any] = {}
    running: dict[Any, Cell] = {}
    for cell in waiting:
        if cell.agents not in data:
            data[cell.agents] = make.remote(settings, folder, cell.agents)
        tokenizer = _tokenizer_config(cell)
        key = f"{cell.agents}-{tokenizer.sha256()}"
        if key not in tokenizers:
            tokenizers[key] = fit.remote(settings, folder, cell.agents, tokenizer, data[cell.agents])
        running[train.remote(settings, folder, cell, tokenizers[key], data[cell.agents])] = cell
    done, begun = 0, time.monotonic()
    while running:
        (first,), _ = ray.wait(list(running), num_returns=1)
        cell = running.pop(first)
        result = ray.get(first)
        done += 1
        left = (time.monotonic() - begun) / done * len(running) / 60
        say(f"{cell.name}: {_said(result)}; {len(running)} to go, about {left:.0f} min")
        _keep(settings, cell, result)
        yield cell, result


def _said(result: dict[str, Any]) -> str:
    if "failed" in result:
        return result["failed"]
    metrics = result["metrics"]
    return f"{metrics['rollout/psnr@1']:.1f} dB after one step, {metrics['rollout/psnr@10']:.1f} after ten"


def make_data(settings: StudySettings, folder: Path, agents: int) -> str:
    """The data set of a world, made if it is not there; its path. A Ray task."""
    location = resolve(folder / "data" / f"grid-agents{agents}-{data_digest(settings, agents)[:8]}")
    if not Path(location.path, "manifest.json").exists():
        world = make_world("grid", **world_options(settings, agents))
        ingest_world(world, location.fs, location.path, episodes=settings.episodes, frames=FRAMES)
    return location.path


def _tokenizer_config(cell: Cell) -> Config:
    """The config whose stage 1 gives a cell its tokenizer: all models of a world and seed share it."""
    config = cell.config
    model = replace(type(config.model)(), temporal_window=config.model.temporal_window)
    return replace(config, model=model, loss=type(config.loss)(), slot_hold=0.0, variant="flam")


def fit_tokenizer(settings: StudySettings, folder: Path, agents: int, config: Config, data: str) -> str:
    """Train stage 1, if it is not done; the path of the weights. A Ray task."""
    stage = given_values(config.tokenizer_stage), given_values(config.tokenizer), config.seed, Path(data).name
    digest = hashlib.sha256(json.dumps(stage, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / "tokenizers" / f"agents{agents}-seed{config.seed}-{digest}.safetensors"
    if not place.exists():
        trainer = _trained(settings, config, data, until=config.tokenizer_stage.steps, name=place.stem)
        _write(place, weights_to_bytes(trainer.model.tokenizer))
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
    try:
        trainer = _trained(settings, config, data, until=config.flam_stage.steps, name=cell.name, tokenizer=weights)
        trained = time.monotonic()
        measured = evaluate_on(
            trainer.model.eval(), _source(data), config.evaluation, config.seed, on_broken=_refuse_broken
        )
    except FlamError as error:
        if error.exit_code != _TRAINING_FAILED:
            raise
        result["failed"] = str(error)
    else:
        result |= {"metrics": measured.metrics, "notes": list(measured.notes), "train_seconds": trained - begun}
        save_model(trainer.model.cpu(), folder / "models" / cell.name, f"# {cell.name}\n\nOne training of a study.\n")
        result |= {"weights": _count(trainer.model), "device": _device_name(trainer.device)}
    result |= {"config": to_dict(config), "seconds": time.monotonic() - begun}
    _write(folder / "cells" / f"{cell.name}.json", _json(result))
    return result


def _kept(settings: StudySettings, cell: Cell) -> Path:
    return Path(settings.out) / "cells" / f"{cell.name}.json"


def _keep(settings: StudySettings, cell: Cell, result: dict[str, Any]) -> None:
    place = _kept(settings, cell)
    if not place.exists():
        _write(place, _json(result))


def _json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, indent=1, sort_keys=True).encode()


_TRAINING_FAILED = 5


def _trained(
    settings: StudySettings, config: Config, data: str, *, until: int, name: str, tokenizer: bytes | None = None
) -> Trainer:
    """A trainer after `until` steps: the same program, sample order and noise as a Ray Train run with one worker."""
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if settings.gpus else "cpu")
    stages = stage_plans(config)
    plan = FeedPlan((_source(data),), stages, config.seed, world=1, truth=config.model.latent == "true")
    trainer = Trainer(config, device, tokenizer=tokenizer)
    assembler = Assembler(plan, 0, memory=memory_for(device))
    try:
        for batch in local_steps(plan, 0, assembler):
            if trainer.step == until:
                break
            actions = None if batch.actions is None else torch.from_numpy(batch.actions).to(device)
            meters = trainer.train_step(torch.from_numpy(batch.frames).to(device), batch.ids, actions, batch.places)
            if trainer.step % _SAY_EVERY == 0:
                said = ("tokenizer/psnr", "flam/explained", "flam/kl")
                values = "  ".join(f"{key.split('/')[1]} {float(meters[key]):.3g}" for key in said if key in meters)
                print(f"{name}: step {trainer.step} of {until}  {values}", flush=True)
    finally:
        assembler.close()
    return trainer


def _source(data: str) -> FeedSource:
    location = resolve(data)
    return FeedSource(location, read_manifest(location.fs, location.path))


def _refuse_broken(clip: object) -> None:
    raise AssertionError(f"data that the study made itself are broken: {clip}")


def _count(model: Flam) -> dict[str, int]:
    parts = {"tokenizer": model.tokenizer, "dynamics": model.dynamics}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _write(place: Path, content: bytes) -> None:
    """Whole or not at all: what exists is taken for done."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(place)
