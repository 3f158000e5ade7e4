"""What each Ray Train worker does: restore, then step after step until the end."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import ray.train
import ray.train.torch
import torch

from flam_core.config import Config
from flam_core.learning.trainer import Trainer
from services.feed import FeedPlan, flam_cause, steps_of
from services.storage import Location
from services.tracking import RunInfo, TrackedRun
from services.training import checkpoints

_LOG_EVERY = 50


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker needs to know."""

    config: Config
    plan: FeedPlan
    run: Location
    tracking: RunInfo
    threads: int
    """CPU threads of PyTorch; 0: the cores of the worker's machine but one, shared out among its workers."""


def train_worker(settings: dict[str, WorkerJob]) -> None:
    """The train function of Ray Train.

    An error of flam's (broken data, a loss that is not finite) would come again on every retry: it is left in the
    run's folder for the driver to report, and this and any later attempt end at once. Everything else is Ray Train's
    to retry.
    """
    job = settings["job"]
    if checkpoints.failure(job.run) is not None:
        return
    try:
        _run(job)
    except Exception as error:
        if (cause := flam_cause(error)) is None:
            raise
        checkpoints.leave_failure(job.run, cause)
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks wait for this one: the group is restarted, and then ends at once


def _run(job: WorkerJob) -> None:
    """Order on resume: weights, optimiser, step (all from one commit), then the feed from that step on.

    The sample order and the noise follow from the step.
    """
    context = ray.train.get_context()
    # A core is left to Ray Data: with as many threads as cores, PyTorch's wait for one another most of the time.
    cores = (os.cpu_count() or 1) - 1
    torch.set_num_threads(job.threads or max(1, cores // context.get_local_world_size()))
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    trainer = Trainer(job.config, device, rank=rank, wrap=ray.train.torch.prepare_model)
    if saved := checkpoints.newest(job.run):
        trainer.restore(saved.model, saved.optimizer, saved.meta)
        if rank == 0:
            print(f"resumed at step {trainer.step} of {trainer.total_steps}", flush=True)
    tracked = TrackedRun(job.tracking) if rank == 0 else None
    meters = _Meters(job, tracked)
    if trainer.step < trainer.total_steps:
        _train(job, trainer, meters, rank, device)
    # One report at the end tells Ray Train that all ranks came through.
    ray.train.report({"step": trainer.step, "world": world, "digest": trainer.digest})


def _train(job: WorkerJob, trainer: Trainer, meters: _Meters, rank: int, device: torch.device) -> None:
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None, "the trainer is always given a train data set"
    waited_from = time.perf_counter()
    for batch in steps_of(shard, rank, trainer.step):
        # A copy: the block is Ray's shared memory, which PyTorch must not write to and which should be free soon.
        frames = torch.from_numpy(batch.frames.copy()).to(device, non_blocking=True)
        wait = time.perf_counter() - waited_from
        measured = trainer.train_step(frames, batch.ids)
        meters.step(trainer, measured, wait, frames.shape[0] * frames.shape[1])
        if trainer.step % job.config.checkpoint_every == 0 or trainer.step == trainer.total_steps:
            meters.flush()
            if rank == 0:
                checkpoints.save(job.run, trainer.step, **trainer.state())  # type: ignore[arg-type]
        waited_from = time.perf_counter()
    if trainer.step < trainer.total_steps:
        raise RuntimeError(f"the feed ended at step {trainer.step} of {trainer.total_steps}")


class _Meters:
    """Sums up the steps between two log lines; on rank 0 writes them to MLflow and the console."""

    def __init__(self, job: WorkerJob, tracked: TrackedRun | None) -> None:
        self._job, self._tracked = job, tracked
        self._reset()

    def _reset(self) -> None:
        self._started, self._waited, self._frames, self._steps = time.perf_counter(), 0.0, 0, 0

    def step(self, trainer: Trainer, measured: dict[str, torch.Tensor], wait: float, frames: int) -> None:
        """Count a step; every 50 steps, log."""
        self._waited, self._frames, self._steps = self._waited + wait, self._frames + frames, self._steps + 1
        if self._tracked is None or (trainer.step % _LOG_EVERY and trainer.step != trainer.total_steps):
            return
        took = time.perf_counter() - self._started
        values = {key: float(value) for key, value in measured.items()}
        values["speed/frames_per_second"] = self._frames * self._job.plan.world / took
        values["speed/seconds_per_step"] = took / self._steps
        values["speed/data_wait_share"] = self._waited / took
        self._tracked.log(trainer.step, values)
        left = took / self._steps * (trainer.total_steps - trainer.step)
        told = ("tokenizer/psnr", "flam/explained", "flam/kl")
        line = "  ".join(f"{key.split('/')[1]} {values[key]:.3g}" for key in told if key in values)
        loss = values.get("flam/loss", values.get("tokenizer/loss", 0.0))
        print(
            f"step {trainer.step}/{trainer.total_steps}  loss {loss:.4f}  {line}  "
            f"{values['speed/frames_per_second']:.0f} frames/s  wait {values['speed/data_wait_share']:.0%}  "
            f"left {left / 60:.1f} min",
            flush=True,
        )
        self._reset()

    def flush(self) -> None:
        """Send the metrics to MLflow, before the checkpoint that follows them is committed."""
        if self._tracked is not None:
            self._tracked.flush()
