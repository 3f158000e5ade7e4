"""What each Ray Train worker does: restore, then step after step until the end or until it is told to stop."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch._dynamo  # the first optimiser imports it, for two seconds: better while Ray starts the rest

from flam_core.errors import TrainingFailed, pack
from flam_core.learning.recompute import BLOCKS
from flam_core.learning.spikes import SpikeWatch
from flam_core.learning.state import TrainState
from flam_core.learning.trainer import Trainer
from flam_core.ranks import Share, add_up, shard
from services.feed import FeedPlan, flam_cause
from services.feed.prefetch import DeviceBatch, DevicePrefetcher
from services.storage import exists, read_bytes, write_bytes
from services.tracking.journal import Journal
from services.training import checkpoints
from services.training.agree import agree
from services.training.batches import start_batches
from services.training.chaos import Chaos, parse_chaos
from services.training.job import FEED_TOTALS, STARTS, TOKENIZER, WorkerJob
from services.training.log import TrainLog
from services.training.skipped import Spoilt, WentBack, read_spoilt, record_spoilt
from services.watch import Heart, Spans

_ASK_SECONDS = 2.0
"""Between questions to Ray whether a node is about to go: each makes all ranks wait for one another."""


class Preempted(RuntimeError):
    """Tells Ray Train that all is committed and the workers may be started elsewhere."""


def train_worker(settings: dict[str, WorkerJob]) -> None:
    """The train function of Ray Train.

    An error of flam's (broken data, storage that is full, batches that spoil the weights again and again) would come
    again on every retry: the driver is told to report it, and this and any later attempt end at once. Everything else
    is Ray Train's to retry.
    """
    job = settings["job"]
    if ray.get(job.control.failure.remote()):
        return
    try:
        _run(job)
    except Exception as error:
        if (cause := flam_cause(error)) is None:
            raise
        ray.get(job.control.fail.remote(pack(cause)))
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks wait for this one: the group is restarted, and then ends at once


def _run(job: WorkerJob) -> None:
    """Steps until the end, or until the run is told to stop."""
    with opened(job) as training:
        training.run()
    # One report at the end tells Ray Train that all ranks came through.
    ray.train.report({"step": training.trainer.step, "world": training.heart.world})


@contextmanager
def opened(job: WorkerJob) -> Iterator[Training]:
    """This rank's part of the run, at the newest committed step: heart, journal and trainer.

    Weights, optimiser and step are all from one commit, and the feed begins at that step; the sample order and the
    noise follow from it.
    """
    context = ray.train.get_context()
    saved = checkpoints.newest(job.run)
    step: int = saved.meta["step"] if saved else 0
    if context.get_world_rank() == 0:
        _count_start(job, step)
    # A core is left to Ray Data: with as many threads as cores, PyTorch's wait for one another most of the time.
    cores = (os.cpu_count() or 1) - 1
    torch.set_num_threads(job.threads or max(1, cores // context.get_local_world_size()))
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, which have one value to copy
    rank, world = context.get_world_rank(), context.get_world_size()
    plan = replace(job.plan, world=world)
    heart = Heart(
        job.control,
        rank,
        world,
        local_rank=context.get_local_rank(),
        describe=lambda step: _reads(plan, step, rank),
        spans=Spans(job.run, rank),
    )
    journal = Journal(job.tracking, job.run) if rank == 0 else None
    device: torch.device = ray.train.torch.get_device()
    feed: DevicePrefetcher | None = None
    try:
        log = TrainLog(job, plan, journal, heart)
        if step < plan.total_steps:  # before the trainer is made, which takes its seconds too
            feed = start_batches(job, plan, step, rank, device, log.feed)
        trainer = _trainer(job, saved, heart, device)
        training = Training(job, plan, trainer, log, heart, journal, feed)
        training.restore_meta(saved.meta if saved else {})
        yield training
    finally:
        if feed is not None:
            feed.close()
        heart.close()
        if journal is not None:
            journal.close()


def _trainer(job: WorkerJob, saved: TrainState | None, heart: Heart, device: torch.device) -> Trainer:
    """The trainer, at the step of the checkpoint."""
    rank, world = heart.rank, heart.world
    tokenizer = read_bytes(job.run / TOKENIZER) if job.config.tokenizer_sha256 else None
    trainer = Trainer(
        job.config,
        device,
        share=Share(rank, world, job.clips_at_a_time or None),
        wrap=ray.train.torch.prepare_model if job.parallel == "ddp" or world == 1 else _shared_out,
        tokenizer=tokenizer,
        compiled=job.compiled,
        recomputed=job.recomputed,
        on_stage=heart.stage,
    )
    if saved:
        trainer.restore(saved)
    lost = heart.begins(trainer.step)
    if rank == 0 and (trainer.step or lost):
        seconds = lost * heart.orders.step_seconds
        print(f"resumed at step {trainer.step} of {trainer.total_steps}, lost {seconds:.1f} s of work", flush=True)
    return trainer


def _shared_out(module: torch.nn.Module) -> torch.nn.Module:
    return shard(module, BLOCKS)


def _count_start(job: WorkerJob, step: int) -> None:
    """Raises TrainingFailed if workers begin at this step too often: what ends them does so again and again."""
    place = job.run / STARTS
    before = json.loads(read_bytes(place)) if exists(place) else {"step": -1, "times": 0}
    times = before["times"] + 1 if before["step"] == step else 1
    write_bytes(place, json.dumps({"step": step, "times": times}).encode())
    if times > job.max_restarts + 1:
        raise TrainingFailed(
            f"the workers ended {times - 1} times in a row without a new checkpoint after step {step}",
            fix="The lines above say why they ended. --max_restarts allows for more; the same command tries again.",
        )


def _reads(plan: FeedPlan, step: int, rank: int) -> str:
    """The shards that a step of a rank reads."""
    if step >= plan.total_steps:
        return ""
    windows = plan.windows(step, rank)
    return ", ".join(sorted({f"{plan.sources[w.clip.source].data}/{w.clip.shard}" for w in windows}))


class Training:
    """The steps of one rank."""

    def __init__(
        self,
        job: WorkerJob,
        plan: FeedPlan,
        trainer: Trainer,
        log: TrainLog,
        heart: Heart,
        journal: Journal | None,
        feed: DevicePrefetcher | None,
    ) -> None:
        """feed: from the trainer's step on; None if that is the end. journal: on rank 0."""
        self.job, self.plan, self.trainer, self.log, self.heart = job, plan, trainer, log, heart
        self._feed = feed
        faults = parse_chaos(",".join(job.chaos))
        self._chaos = Chaos(job.run, faults, heart.rank, heart.world, job.control, journal)
        self._writer = checkpoints.Writer(job.run, job.keep)
        self._spoilt = {step for one in read_spoilt(job.run) for step in one.steps}
        self._asked_at = time.monotonic()
        self._preempted = self._stopped = False
        self._spikes = SpikeWatch(job.config.spike_factor)
        self._measured: dict[str, torch.Tensor] = {}
        """By the step before."""

    def run(self) -> None:
        """Until the end, or until this run is told to stop.

        Raises WentBack if a step spoilt the weights, Preempted if a node is about to go and all is committed.
        """
        trainer = self.trainer
        if trainer.step == trainer.total_steps:
            return
        for batch in self.batches():
            if self.step(batch):
                break
        self.heart.stage("checkpoint")
        self._writer.wait()
        if self._preempted:
            raise Preempted(f"step {trainer.step} is committed")
        if trainer.step < trainer.total_steps and not self._stopped:
            raise RuntimeError(f"the feed ended at step {trainer.step} of {trainer.total_steps}")
        if self.heart.rank == 0:
            write_bytes(self.job.run / FEED_TOTALS, json.dumps(self.log.totals()).encode())

    def batches(self) -> Generator[DeviceBatch, None, None]:
        """This rank's batches from the step in hand on, on the device; once."""
        if self._feed is not None:
            yield from self._feed

    def step(self, batch: DeviceBatch) -> bool:
        """Train on a batch, log and commit what is due; whether to stop after it. All ranks must call it."""
        trainer = self.trainer
        self.log.begin()
        stop = self._learn(batch)
        if stop or trainer.step % self.job.config.checkpoint_every == 0 or trainer.step == trainer.total_steps:
            self._save()
        self.heart.step(trainer.step)
        return stop

    def restore_meta(self, meta: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says beside the trainer's state: the losses and the warnings so far."""
        self._spikes = SpikeWatch(self.job.config.spike_factor, meta.get("losses", ()))
        if "watch" in meta:
            self.log.watch.restore(meta["watch"])

    def _learn(self, batch: DeviceBatch) -> bool:
        """Train on a batch and log; whether to stop after it."""
        trainer, heart = self.trainer, self.heart
        number = trainer.step
        heart.stage("forward")
        if number == self.job.config.tokenizer_stage.steps:
            self._spikes.forget()
        if number in self._spoilt:
            trainer.pass_over(batch.frames)
            if self._measured:  # a log line that is due is not left out with the step
                self.log.step(trainer, self._measured, *batch.frames.shape[:2])
            return False
        self._chaos.step(number, trainer.model.tokenizer if trainer.stage == 0 else trainer.model.dynamics)
        why, measured = "", {}
        try:
            measured = trainer.train_step(batch.frames, batch.ids, batch.actions, batch.places)
        except TrainingFailed as failed:  # on all ranks alike: the norm is that of the whole gradient
            why = failed.what
        if why:
            raise self._go_back([number], why)
        heart.stage("report")
        loss = measured["tokenizer/loss" if "tokenizer/loss" in measured else "flam/loss"]
        ask = heart.rank == 0 and time.monotonic() - self._asked_at > _ASK_SECONDS
        agreed = agree(loss.to(trainer.device), batch.frames.shape[0], stop=bool(heart.stop), ask=ask)
        if self._spikes.spike(agreed.loss):
            # Either this batch is odd, or the step before it went wrong.
            steps = [step for step in (number - 1, number) if step >= 0]
            raise self._go_back(steps, f"the loss leapt to {agreed.loss:.3g}")
        self._measured = measured
        self.log.step(trainer, measured, *batch.frames.shape[:2])
        if agreed.ask:
            self._asked_at = time.monotonic()
            self._preempted = ray.train.get_preemption_info() is not None
        self._stopped = agreed.stop
        return self._stopped or self._preempted

    def _go_back(self, steps: list[int], why: str) -> WentBack:
        """Note that steps are left out, and the checkpoints after them forgotten; what to raise then. All ranks must
        call it."""
        self._writer.wait()
        if self.heart.rank == 0:
            record_spoilt(self.job.run, Spoilt(steps, f"step {steps[-1]}: {why}"))
            checkpoints.forget_after(self.job.run, steps[0])
            print(f"going back: {why}; steps {steps} are left out", flush=True)
            self.log.tag({f"skipped.{steps[-1]}": why})
            self.log.sync()
        add_up(torch.zeros(1, device=self.trainer.device))  # the others wait until that is written
        return WentBack(f"{why} in step {steps[-1]}")

    def _save(self) -> None:
        """All ranks must call it. What was logged is written down first, so no committed step lacks its metrics."""
        self.heart.stage("checkpoint")
        self.log.sync()
        state = self.trainer.state()
        if state is None:
            return
        # What was seen of losses and said in warnings is kept, too, so that a resumed run goes on as the unbroken one.
        more = {"watch": self.log.watch.state(), "losses": self._spikes.state()}
        score = self.log.score.pop(self.trainer.step, None)
        self._writer.save(replace(state, meta=state.meta | more), score, then=self._chaos.committed)
