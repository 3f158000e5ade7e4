"""Runs as others see them: which there are, and what one says while it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flam_core.errors import DataError, EnvironmentFault, SettingsError
from services.storage import exists, resolve
from services.tracking.journal import segments
from services.tracking.run import known_runs
from services.tracking.server import default_tracking_uri
from services.training import checkpoints
from services.training.prepare import at_home, home
from services.training.settings import TrainSettings
from services.watch import held

_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class RunState:
    """How a run stands."""

    run_id: str
    state: str
    """running, finished, failed, stopped; interrupted: its driver was killed, and the same command goes on."""
    step: int | None
    """Steps committed; None if its folder cannot be read from here."""
    total: int | None
    folder: str
    started: float
    """Unix time."""
    psnr: float | None
    """Over ten held-out steps, in dB, once it is finished."""


def list_runs(settings: TrainSettings) -> list[RunState]:
    """The runs of the experiment that MLflow knows of, newest first, each with what its folder or bucket says.

    Raises EnvironmentFault if MLflow does not answer.
    """
    found = []
    for known in known_runs(settings.tracking or default_tracking_uri(home()), settings.experiment):
        step = total = None
        running = False
        try:
            run = resolve(known.folder, check=False)
            step, running = checkpoints.committed_step(run), held(run)
            if exists(run / "config.json"):
                config = checkpoints.stored_config(run)
                total = config.tokenizer_stage.steps + config.flam_stage.steps
        except (EnvironmentFault, DataError, SettingsError):
            pass  # from here its folder cannot be seen; MLflow's word is all there is
        state = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}.get(known.status, "interrupted")
        found.append(
            RunState(
                known.name,
                "running" if running else state,
                step,
                total,
                known.folder,
                known.started,
                known.metrics.get("rollout/psnr_at_10"),
            )
        )
    return found


def follow(settings: TrainSettings, run_id: str) -> Iterator[str]:
    """What a run logs, a line each, until it ends: read from its folder or bucket, so from any machine.

    Raises SettingsError if there is no such run.
    """
    run = resolve(at_home(settings.storage)) / run_id
    if not exists(run / "config.json"):
        raise SettingsError(
            f"there is no run {run_id} in {run}", fix="jobs/train.py --list shows the runs; --storage says where."
        )
    number = 1
    while True:
        running = held(run)
        for number_of, lines in segments(run, number):
            number = number_of + 1
            for line in lines:
                if line.step is not None:
                    yield f"step {line.step}  {_shown(line.metrics)}"
                for key, value in line.tags.items():
                    yield f"{key}: {value}"
        if not running:  # it was read to its end after that was known
            yield f"run {run_id} is not running: step {checkpoints.committed_step(run)} is committed"
            return
        time.sleep(_LOOK_SECONDS)


def _shown(metrics: Mapping[str, float]) -> str:
    keys = ("tokenizer/loss", "tokenizer/psnr", "flam/loss", "flam/explained", "flam/kl", "speed/frames_per_second")
    shown = [f"{key.split('/')[1]} {metrics[key]:.4g}" for key in keys if key in metrics]
    if not shown:
        shown = [f"{key} {value:.4g}" for key, value in metrics.items() if not key.startswith("progress/")]
    return "  ".join(shown)
