"""The batches of a rank, from Ray Data to its device."""

from __future__ import annotations

import os
from collections.abc import Generator

import ray.train
import torch

from services.feed import Assembler, FeedMeters, FeedPlan, StepBatch, steps_of
from services.feed.prefetch import DevicePrefetcher, memory_for
from services.training.broken import BrokenClips
from services.training.job import WorkerJob


def start_batches(
    job: WorkerJob, plan: FeedPlan, step: int, rank: int, device: torch.device, meters: FeedMeters
) -> DevicePrefetcher:
    """The batches of this rank from `step` on, on their way already: Ray Data takes seconds to begin."""
    assembler = Assembler(
        plan,
        rank,
        threads=_decoders(),
        memory=memory_for(device),
        meters=meters,
        on_broken=BrokenClips(job.run, plan, rank, job.max_bad_share),
    )
    batches = DevicePrefetcher(_steps(plan, step, rank, assembler), device, meters, plan.batch_bytes)
    batches.start()
    return batches


def _steps(plan: FeedPlan, step: int, rank: int, assembler: Assembler) -> Generator[StepBatch, None, None]:
    try:
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None, "the trainer is always given a train data set"
        yield from steps_of(shard, plan, step, assembler, rank)
    finally:
        assembler.close()


def _decoders() -> int:
    """Threads that decode clips beside the trainer: few, for the trainer's own threads want the cores too."""
    return max(1, min(4, (os.cpu_count() or 1) // (4 * ray.train.get_context().get_local_world_size())))
