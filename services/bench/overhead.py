"""What the service costs a step: a run's own steps, in turns with bare ones of the same trainer on the same batches."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from flam_core.data.ingest import ingest_world
from flam_core.recipes import get_recipe
from flam_core.worlds import make_world
from services.storage import Location, read_bytes, resolve, write_bytes
from services.training import TrainSettings, prepare
from services.training.launch import run_with
from services.training.worker import Training, opened

_RESULT = "overhead.json"


@dataclass(frozen=True)
class OverheadSettings:
    """What `jobs/bench.py overhead` takes."""

    recipe: str = "tiny"
    rounds: int = 8
    """Pairs of turns."""
    steps: int = 50
    """Of a turn; the run commits a checkpoint in each of its turns."""
    episodes: int = 100
    """Of 64 frames of `grid`, made for the run."""


def bench_overhead(settings: OverheadSettings) -> dict[str, Any]:
    """Seconds of a step with the service (feed, heartbeat, agreement, log, journal, checkpoints) and without.

    `overhead` is the median over rounds of one over the other, less 1.
    """
    recipe = get_recipe(settings.recipe)
    with tempfile.TemporaryDirectory(prefix="flam-overhead-") as name:
        place = Path(name)
        world = make_world("grid", frame_size=recipe.tokenizer.frame_size, agents=3, cells=6)
        data = resolve(str(place / "grid"))
        ingest_world(world, data.fs, data.path, episodes=settings.episodes, frames=64)
        config = replace(recipe, checkpoint_every=settings.steps)
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
            rounds = self._turns(training)
        ratios = [one["with"] / one["without"] for one in rounds]
        result = {
            "overhead": statistics.median(ratios) - 1,
            "rounds": [ratio - 1 for ratio in ratios],
            "step_seconds": statistics.median(one["without"] for one in rounds),
            "step_seconds_with": statistics.median(one["with"] for one in rounds),
            "steps_of_a_turn": self.steps,
        }
        _leave(given["job"].run, result)
        ray.train.report({"step": training.trainer.step})

    def _turns(self, training: Training) -> list[dict[str, float]]:
        batches, found = training.batches(), []
        training.step(next(batches))  # the first is slow
        for _ in range(self.rounds):
            begun, kept = time.perf_counter(), []
            for _ in range(self.steps):
                batch = next(batches)
                kept = [*kept[-9:], batch]
                training.step(batch)
            of_service = time.perf_counter() - begun
            found.append({"with": of_service / self.steps, "without": self._bare(training, kept)})
        return found

    def _bare(self, training: Training, kept: list[Any]) -> float:
        """Seconds of a step of the trainer alone; its steps do not count, though it learns from them."""
        trainer = training.trainer
        step = trainer.step
        begun = time.perf_counter()
        for number in range(self.steps):
            batch = kept[number % len(kept)]
            trainer.train_step(batch.frames, batch.ids, batch.actions, batch.places)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
        trainer.step = step
        return (time.perf_counter() - begun) / self.steps


def _leave(run: Location, result: dict[str, Any]) -> None:
    write_bytes(resolve(run.uri) / _RESULT, json.dumps(result).encode())
