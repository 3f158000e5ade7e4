"""What a run says while it trains: to Ray's metrics, to MLflow through the journal, and to the console."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import psutil
import torch

from flam_core.flops import Peak, datasheet_peak, utilisation
from flam_core.learning.collapse import LOG_EVERY, CollapseWatch
from flam_core.learning.cost import step_flops
from flam_core.learning.schedule import autocast_dtype
from flam_core.learning.trainer import Trainer
from services.feed import FeedMeters, FeedPlan
from services.feed.spill import SPILLED, spilled_bytes
from services.tracking.journal import Journal
from services.training.job import WorkerJob
from services.watch import Heart
from services.watch.gauges import HEALTH, SPEED, Gauges

if TYPE_CHECKING:
    from services.training.held_out import EvaluationDuring

_SUMMED = ("bytes_read", "retries", "broken_clips")


class TrainLog:
    """Sums up the steps between two log lines."""

    def __init__(self, job: WorkerJob, plan: FeedPlan, journal: Journal | None, heart: Heart) -> None:
        """journal: on rank 0, which speaks for all."""
        self.feed = FeedMeters()
        self.watch = CollapseWatch(job.config, plan.world)
        self.score: dict[int, float] = {}
        """What held-out clips say of the model after a step, if they were asked: PSNR in dB. Higher is better."""
        self._job, self._plan, self._journal, self._heart = job, plan, journal, heart
        self._gauges = Gauges(job.run.path.rpartition("/")[2], heart.rank)
        self._spilled_before = spilled_bytes()
        self._evaluation: EvaluationDuring | None = None
        self._flops: dict[int, float] = {}
        self._begun = False
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._held_out = ""
        self._reset()

    def begin(self) -> None:
        """The first batch is there: what starting up took is not the steps'."""
        if not self._begun:
            self._begun = True
            self._totals["first_batch_seconds"] = self.feed.wait_seconds
            self.feed.wait_seconds = 0.0
            self._reset()

    def _reset(self) -> None:
        self._started, self._frames, self._steps = time.perf_counter(), 0, 0

    def step(self, trainer: Trainer, measured: dict[str, torch.Tensor], clips: int, frames: int) -> None:
        """Count a step on `clips` of this rank's clips, of so many frames; every 50 steps, log. All ranks must call
        it."""
        batch = self._plan.stages[self._plan.stage_of(trainer.step - 1)[0]].batch_clips
        self._frames, self._steps = self._frames + batch * frames, self._steps + 1
        evaluated = self._evaluated(trainer)
        if trainer.step % LOG_EVERY and trainer.step != trainer.total_steps:
            if evaluated and self._journal is not None:
                self._journal.log(trainer.step, evaluated)
            return
        values = {key: float(value) for key, value in trainer.over_ranks(measured, clips).items()}
        took = time.perf_counter() - self._started  # after the values: a GPU has then done these steps
        feed = self.feed.take(took)
        feed[SPILLED] = float(spilled_bytes() - self._spilled_before)
        self._gauges.set(feed)
        self._totals["seconds"] += took
        self._totals["frames"] += self._frames
        self._totals["wait"] += feed["speed/data_wait_share"] * took
        for name in _SUMMED:
            self._totals[name] += feed[f"feed/{name}"]
        self._totals["spilled_bytes"] = feed[SPILLED]
        values |= feed
        values |= self._speed(trainer, took)
        if self._journal is not None:
            self._journal.log(trainer.step, values | self._machines() | evaluated)
            self._print(trainer, values)
            first = 0 if "tokenizer/loss" in values else self._job.config.tokenizer_stage.steps
            for finding in self.watch.observe(trainer.step - first, values):
                print(f"warning: {finding}", flush=True)
                self._journal.tag({f"finding.{finding.name}": f"step {trainer.step}: {finding.said}"})
            self._gauges.set({key: values[key] for key in (*HEALTH, *SPEED) if key in values})
            self._gauges.set_findings(self.watch.holding)
        self._reset()

    def _speed(self, trainer: Trainer, took: float) -> dict[str, float]:
        """How fast the last steps were, and in how much memory."""
        found = {
            "speed/frames_per_second": self._frames / took,
            "speed/seconds_per_step": took / self._steps,
            "speed/memory_gb": _memory_gb(trainer.device),
        }
        if (peak := _peak(trainer)) is not None and self._journal is not None:
            stage = int(trainer.step > self._job.config.tokenizer_stage.steps)
            if stage not in self._flops:
                self._flops[stage] = step_flops(self._job.config, stage, trainer.device)
            found["speed/mfu"] = utilisation(self._flops[stage] / self._plan.world, took / self._steps, peak)
        return found

    def _machines(self) -> dict[str, float]:
        """System metrics of all nodes: `system/node-0/cpu_percent`, ..."""
        return {
            f"system/{node}/{key}": value
            for node, values in self._heart.orders.machines.items()
            for key, value in values.items()
        }

    def _evaluated(self, trainer: Trainer) -> dict[str, float]:
        """What `evaluation.during` asks for after this step, as `during/...`. The other ranks wait meanwhile. All
        must call it."""
        if not self._job.config.evaluation.due(trainer.step - self._job.config.tokenizer_stage.steps):
            return {}
        model = trainer.model_in_use()
        if self._journal is None:
            return {}
        begun = time.perf_counter()
        self._heart.stage("evaluation")
        if self._evaluation is None:
            from services.training.held_out import EvaluationDuring  # seconds, which a start need not wait for

            self._evaluation = EvaluationDuring(self._job.config, self._plan.sources[0])
        found = self._evaluation(model, trainer.step)
        horizon = self._job.config.evaluation.horizon
        if (score := found.get(f"rollout/psnr@{horizon}")) is not None:
            self.score = {trainer.step: score}
        if "rollout/psnr@1" in found:
            self._held_out = f"psnr {found['rollout/psnr@1']:.2f}"
        shown = [key for key in ("rollout/psnr@1", f"rollout/psnr@{horizon}", "dci/i", "leakage") if key in found]
        told = "  ".join(f"{key} {found[key]:.3g}" for key in shown)
        print(f"step {trainer.step}: held-out {told}", flush=True)
        self._heart.stage("report")
        self._started += time.perf_counter() - begun  # no part of the steps' time
        return {f"during/{key}": value for key, value in found.items()}

    def _print(self, trainer: Trainer, values: dict[str, float]) -> None:
        stage = "flam" if "flam/loss" in values else "tokenizer"
        left = values["speed/seconds_per_step"] * (trainer.total_steps - trainer.step)
        told = {"psnr": "tokenizer/psnr", "explained": "flam/explained", "kl": "flam/kl", "grad": f"{stage}/grad_norm"}
        parts = [
            f"step {trainer.step}/{trainer.total_steps}",
            f"loss {values[f'{stage}/loss']:.4f}",
            *([self._held_out] if self._held_out else []),
            *(f"{name} {values[key]:.3g}" for name, key in told.items() if key in values),
            f"{values['speed/frames_per_second']:.0f} frames/s",
            f"wait {values['speed/data_wait_share']:.0%}",
            *([f"mfu {values['speed/mfu']:.1%}"] if "speed/mfu" in values else []),
            f"{values['speed/memory_gb']:.1f} GB",
            f"left {left / 60:.1f} min",
        ]
        self._heart.line = "  ".join(parts)
        print(self._heart.line, flush=True)

    def totals(self) -> dict[str, float]:
        """Of this attempt: frames a second, share of the time waited for data, and what the feed counted."""
        seconds = self._totals["seconds"] or 1.0
        return {
            "frames_per_second": self._totals["frames"] / seconds,
            "data_wait_share": self._totals["wait"] / seconds,
            **{name: self._totals[name] for name in (*_SUMMED, "spilled_bytes", "first_batch_seconds")},
        }

    def sync(self) -> None:
        """Write the metrics down, before the checkpoint that follows them is committed."""
        if self._journal is not None:
            self._journal.sync()

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags of the MLflow run."""
        if self._journal is not None:
            self._journal.tag(tags)


def _memory_gb(device: torch.device) -> float:
    """The most that was in use on a GPU, or what this process has in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def _peak(trainer: Trainer) -> Peak | None:
    """The most that the device can do, where its datasheet is known."""
    if trainer.device.type != "cuda":
        return None
    precision = "bf16" if autocast_dtype(trainer.config.precision, trainer.device) is not None else "fp32"
    return datasheet_peak(torch.cuda.get_device_name(trainer.device), precision, tf32=torch.backends.cudnn.allow_tf32)
