"""What each Ray Train worker does: restore, then step after step until the end."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace

import ray.train
import ray.train.torch
import torch

from flam_core.config import Config
from flam_core.learning.collapse import CollapseWatch
from flam_core.learning.trainer import Trainer
from flam_core.ranks import Share
from services.feed import Assembler, FeedMeters, FeedPlan, flam_cause, steps_of
from services.feed.meters import FeedGauges
from services.feed.prefetch import DevicePrefetcher, memory_for
from services.feed.spill import spilled_bytes
from services.storage import Location, read_bytes, write_bytes
from services.tracking import Journal, RunInfo
from services.training import checkpoints
from services.training.broken import BrokenClips
from services.training.held_out import EvaluationDuring

TOKENIZER = "tokenizer.safetensors"
"""A tokenizer that was given, in the run's folder."""
FEED_TOTALS = "feed.json"
"""What the feed did in the run's last attempt, in its folder."""
_LOG_EVERY = 50
_SUMMED = ("bytes_read", "retries", "broken_clips")


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker needs to know."""

    config: Config
    plan: FeedPlan
    run: Location
    tracking: RunInfo
    threads: int
    """CPU threads of PyTorch; 0: the cores of the worker's machine but one, shared out among its workers."""
    max_bad_share: float
    """Share of clips that may turn out to be broken."""
    keep: int
    """Newest checkpoints that are kept."""
    clips_at_a_time: int
    """That go through the model together on one rank; 0: all of its part of a batch."""
    compiled: bool
    recomputed: bool


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
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, which have one value to copy
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    tokenizer = read_bytes(job.run / TOKENIZER) if job.config.tokenizer_sha256 else None
    trainer = Trainer(
        job.config,
        device,
        share=Share(rank, world, job.clips_at_a_time or None),
        wrap=ray.train.torch.prepare_model,
        tokenizer=tokenizer,
        compiled=job.compiled,
        recomputed=job.recomputed,
    )
    if saved := checkpoints.newest(job.run):
        trainer.restore(saved)
        if rank == 0:
            print(f"resumed at step {trainer.step} of {trainer.total_steps}", flush=True)
    journal = Journal(job.tracking, job.run) if rank == 0 else None
    log = _Log(job, journal, rank)
    if saved and "watch" in saved.meta:
        log.watch.restore(saved.meta["watch"])
    if trainer.step < trainer.total_steps:
        _train(job, trainer, log, rank, device)
    if journal is not None:
        journal.close()
    # One report at the end tells Ray Train that all ranks came through.
    ray.train.report({"step": trainer.step, "world": world})


def _train(job: WorkerJob, trainer: Trainer, log: _Log, rank: int, device: torch.device) -> None:
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None, "the trainer is always given a train data set"
    assembler = Assembler(
        job.plan,
        rank,
        threads=_decoders(),
        memory=memory_for(device),
        meters=log.feed,
        on_broken=BrokenClips(job.run, job.plan, rank, job.max_bad_share),
    )
    batches = steps_of(shard, job.plan, trainer.step, assembler, rank)
    writer = checkpoints.Writer(job.run, job.keep)
    try:
        for batch in DevicePrefetcher(batches, device, log.feed, job.plan.batch_bytes):
            log.begin()
            measured = trainer.train_step(batch.frames, batch.ids, batch.actions, batch.places)
            log.step(trainer, measured, batch.frames.shape[0], batch.frames.shape[1])
            if trainer.step % job.config.checkpoint_every == 0 or trainer.step == trainer.total_steps:
                _save(trainer, log, writer)
        writer.wait()
    finally:
        assembler.close()
    if trainer.step < trainer.total_steps:
        raise RuntimeError(f"the feed ended at step {trainer.step} of {trainer.total_steps}")
    if rank == 0:
        write_bytes(job.run / FEED_TOTALS, json.dumps(log.totals()).encode())


def _save(trainer: Trainer, log: _Log, writer: checkpoints.Writer) -> None:
    """All ranks must call it. What was logged is written down first, so that no committed step lacks its metrics."""
    log.flush()
    state = trainer.state()
    if state is not None:
        # The warnings given are kept, too, so that a resumed run does not repeat them.
        writer.save(replace(state, meta=state.meta | {"watch": log.watch.state()}), log.score.pop(trainer.step, None))


def _decoders() -> int:
    """Threads that decode clips beside the trainer: few, for the trainer's own threads want the cores too."""
    return max(1, min(4, (os.cpu_count() or 1) // (4 * ray.train.get_context().get_local_world_size())))


class _Log:
    """Sums up the steps between two log lines: for Ray's metrics, and on rank 0 for MLflow and the console."""

    def __init__(self, job: WorkerJob, journal: Journal | None, rank: int) -> None:
        self.feed = FeedMeters()
        self._job, self._journal = job, journal
        self._gauges = FeedGauges(job.run.path.rpartition("/")[2], rank)
        self._spilled_before = spilled_bytes()
        self._evaluation = EvaluationDuring(job.config, job.plan.sources[0])
        self.watch = CollapseWatch(job.config, job.plan.world)
        self.score: dict[int, float] = {}
        """What held-out clips say of the model after a step, if they were asked: PSNR in dB. Higher is better."""
        self._begun = False
        self._totals: defaultdict[str, float] = defaultdict(float)
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
        """Count a step on `clips` clips of so many frames; every 50 steps, log. All ranks must call it."""
        self._frames, self._steps = self._frames + clips * frames, self._steps + 1
        evaluated = self._evaluated(trainer)
        if trainer.step % _LOG_EVERY and trainer.step != trainer.total_steps:
            if evaluated and self._journal is not None:
                self._journal.log(trainer.step, evaluated)
            return
        values = {key: float(value) for key, value in trainer.over_ranks(measured, clips).items()}
        took = time.perf_counter() - self._started  # after the values: a GPU has then done these steps
        feed = self.feed.take(took)
        feed["feed/spilled_bytes"] = float(spilled_bytes() - self._spilled_before)
        self._gauges.set(feed)
        self._totals["seconds"] += took
        self._totals["frames"] += self._frames * self._job.plan.world
        self._totals["wait"] += feed["speed/data_wait_share"] * took
        for name in _SUMMED:
            self._totals[name] += feed[f"feed/{name}"]
        self._totals["spilled_bytes"] = feed["feed/spilled_bytes"]
        values |= feed
        values["speed/frames_per_second"] = self._frames * self._job.plan.world / took
        values["speed/seconds_per_step"] = took / self._steps
        if self._journal is not None:
            self._journal.log(trainer.step, values | evaluated)
            self._print(trainer, values)
            first = 0 if "tokenizer/loss" in values else self._job.config.tokenizer_stage.steps
            for finding in self.watch.observe(trainer.step - first, values):
                print(f"warning: {finding}", flush=True)
                self._journal.tag({f"finding.{finding.name}": f"step {trainer.step}: {finding.said}"})
        self._reset()

    def _evaluated(self, trainer: Trainer) -> dict[str, float]:
        """What `evaluation.during` asks for after this step, as `during/...`. The other ranks wait meanwhile."""
        if self._journal is None:
            return {}
        begun = time.perf_counter()
        found = self._evaluation(trainer)
        if found:
            if (score := found.get(f"rollout/psnr@{self._job.config.evaluation.horizon}")) is not None:
                self.score = {trainer.step: score}
            shown = [key for key in ("rollout/psnr@1", "rollout/psnr@10", "dci/i", "leakage") if key in found]
            told = "  ".join(f"{key} {found[key]:.3g}" for key in shown)
            print(f"step {trainer.step}: held-out {told}", flush=True)
        self._started += time.perf_counter() - begun  # no part of the steps' time
        return {f"during/{key}": value for key, value in found.items()}

    def _print(self, trainer: Trainer, values: dict[str, float]) -> None:
        left = values["speed/seconds_per_step"] * (trainer.total_steps - trainer.step)
        told = ("tokenizer/psnr", "flam/explained", "flam/kl")
        line = "  ".join(f"{key.split('/')[1]} {values[key]:.3g}" for key in told if key in values)
        loss = values.get("flam/loss", values.get("tokenizer/loss", 0.0))
        print(
            f"step {trainer.step}/{trainer.total_steps}  loss {loss:.4f}  {line}  "
            f"{values['speed/frames_per_second']:.0f} frames/s  wait {values['speed/data_wait_share']:.0%}  "
            f"left {left / 60:.1f} min",
            flush=True,
        )

    def totals(self) -> dict[str, float]:
        """Of this attempt: frames a second, share of the time waited for data, and what the feed counted."""
        seconds = self._totals["seconds"] or 1.0
        return {
            "frames_per_second": self._totals["frames"] / seconds,
            "data_wait_share": self._totals["wait"] / seconds,
            **{name: self._totals[name] for name in (*_SUMMED, "spilled_bytes", "first_batch_seconds")},
        }

    def flush(self) -> None:
        """Write the metrics down, before the checkpoint that follows them is committed."""
        if self._journal is not None:
            self._journal.sync()
