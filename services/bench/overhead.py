"""What the service costs a step: a run's own steps, in turns with bare ones of the same trainer on the same batches."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from flam_core.data.ingest import ingest_world
from flam_core.learning.trainer import Trainer
from flam_core.recipes import get_recipe
from flam_core.worlds import make_world
from services.feed.prefetch import DeviceBatch
from services.storage import Location, read_bytes, resolve, write_bytes
from services.training.launch import run_with
from services.training.prepare import prepare
from services.training.settings import TrainSettings
from services.training.worker import Training, opened

_RESULT = "overhead.json"


@dataclass(frozen=True)
class OverheadSettings:
    """What `jobs/bench.py overhead` takes."""

    recipe: str = "tiny"
    times: int = 4
    """Clips of a batch, in those of the recipe, so that a step takes 100 ms or more."""
    rounds: int = 30
    """Turns of each kind."""
    steps: int = 10
    """Of a turn."""
    checkpoint_every: int = 100
    """Steps of the service."""
    episodes: int = 100
    """Of 64 frames of `grid`, made for the run."""


def bench_overhead(settings: OverheadSettings) -> dict[str, Any]:
    """Seconds of a step with the service (heartbeat, agreement, log, journal, checkpoints) and without.

    `overhead` is the median over rounds of a turn of the service over one of a bare loop, less 1; the loop takes its
    batches from the same feed and does nothing but the trainer's step. `overhead_and_feed`: over one that goes through
    ten batches in memory again and again, so that the feed's work on the same cores counts too. `outside_share`: the
    part of the service's steps that is spent outside of the trainer's.
    """
    recipe = get_recipe(settings.recipe)
    with tempfile.TemporaryDirectory(prefix="flam-overhead-") as name:
        place = Path(name)
        world = make_world("grid", frame_size=recipe.tokenizer.frame_size, agents=3, cells=6)
        data = resolve(str(place / "grid"))
        ingest_world(world, data.fs, data.path, episodes=settings.episodes, frames=64)
        stage = replace(
            recipe.tokenizer_stage,
            batch_clips=settings.times * recipe.tokenizer_stage.batch_clips,
            steps=(2 * settings.rounds + 1) * settings.steps + 2,  # all turns are in stage 1
        )
        config = replace(recipe, tokenizer_stage=stage, checkpoint_every=settings.checkpoint_every)
        prepared = prepare(
            config,
            TrainSettings(data=data.path, storage=str(place / "runs"), tracking=f"sqlite:///{place / 'mlflow.db'}"),
        )
        run_with(prepared, _Turns(settings.rounds, settings.steps))
        return json.loads(read_bytes(prepared.run / _RESULT))


@dataclass(frozen=True)
class _Turns:
    """The train function: a run that is left aside every so many steps."""

    rounds: int
    steps: int

    def __call__(self, given: dict[str, Any]) -> None:
        with opened(given["job"]) as training:
            result = self._turns(training)
        _leave(given["job"].run, result)
        ray.train.report({"step": training.trainer.step})

    def _turns(self, training: Training) -> dict[str, Any]:
        batches = training.batches()
        training.step(next(batches))  # the first is slow
        kept: list[DeviceBatch] = []
        found: dict[str, list[float]] = {"served": [], "loop": [], "memory": [], "outside": []}
        for number in range(self.rounds):
            for kind in ("served", "loop") if number % 2 else ("loop", "served"):
                kept, begun = [], time.perf_counter()
                with _timed(training.trainer) as inside:
                    for _ in range(self.steps):
                        kept.append(next(batches))
                        training.step(kept[-1]) if kind == "served" else _bare(training.trainer, kept[-1])
                took = time.perf_counter() - begun
                found[kind].append(took / self.steps)
                if kind == "served":
                    found["outside"].append(1 - inside.seconds / took)
            found["memory"].append(self._from_memory(training.trainer, kept))
        over = {
            kind: [one / other - 1 for one, other in zip(found["served"], found[kind], strict=True)]
            for kind in ("loop", "memory")
        }
        return {
            "overhead": statistics.median(over["loop"]),
            "overhead_and_feed": statistics.median(over["memory"]),
            "outside_share": statistics.median(found["outside"]),
            **{f"{kind}_step_seconds": statistics.median(found[kind]) for kind in ("served", "loop", "memory")},
            "rounds": over,
            "steps_of_a_turn": self.steps,
        }

    def _from_memory(self, trainer: Trainer, kept: list[DeviceBatch]) -> float:
        """Seconds of a step without feed and service; such steps do not count, though the trainer learns from them."""
        step, begun = trainer.step, time.perf_counter()
        for number in range(self.steps):
            _bare(trainer, kept[number % len(kept)])
        trainer.step = step
        return (time.perf_counter() - begun) / self.steps


def _bare(trainer: Trainer, batch: DeviceBatch) -> None:
    trainer.train_step(batch.frames, batch.ids, batch.actions, batch.places)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


class _Stopwatch:
    """A function, and the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *given: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self._function(*given)
        finally:
            self.seconds += time.perf_counter() - begun


@contextmanager
def _timed(trainer: Trainer) -> Iterator[_Stopwatch]:
    """The trainer's steps under a stopwatch."""
    watch = _Stopwatch(trainer.train_step)
    trainer.train_step = watch  # pyright: ignore[reportAttributeAccessIssue] - it takes what the method does
    try:
        yield watch
    finally:
        del trainer.train_step  # the method shows again


def _leave(run: Location, result: dict[str, Any]) -> None:
    write_bytes(resolve(run.uri) / _RESULT, json.dumps(result).encode())
