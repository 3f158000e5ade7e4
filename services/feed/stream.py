"""One Ray Data execution per run: plan rows in, contiguous uint8 batches out, in order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from flam_core.errors import FlamError, TrainingFailed, unpack
from services.feed.plan import FeedPlan
from services.feed.read import read_or_say
from services.feed.throttle import Throttle


@dataclass(frozen=True)
class StepBatch:
    """What one rank trains on at one step."""

    step: int
    """Global step, counted over all stages."""
    frames: np.ndarray
    """uint8 [B, T, H, W, 3], read-only."""
    ids: list[str]
    """Of the windows."""


def make_dataset(plan: FeedPlan, start: int, *, task_cpus: float) -> ray.data.Dataset:
    """The data set of all steps from `start` on. A row is one step of one rank; a block is one read task."""
    tasks = math.ceil((plan.total_steps - start) / plan.chunk_steps) * plan.world
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if Throttle not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Throttle]
    plan.orders()  # data that do not suffice are reported here, not from a task
    dataset = ray.data.range(tasks, override_num_blocks=tasks)
    return dataset.map_batches(
        partial(_read, plan=ray.put(plan), start=start),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=task_cpus,
        zero_copy_batch=True,
    )


def _read(batch: pa.Table, plan: Any, start: int) -> pa.Table:
    known = _get(plan)
    chunk, rank = divmod(batch["id"][0].as_py(), known.world)
    first = start + chunk * known.chunk_steps
    return read_or_say(known, rank, range(first, min(first + known.chunk_steps, known.total_steps)))


def _get(reference: Any) -> FeedPlan:
    return ray.get(reference)


def steps_of(shard: ray.data.DataIterator, rank: int, start: int) -> Iterator[StepBatch]:
    """The batches of this rank from step `start` on.

    Order is checked against the plan, never assumed. Raises TrainingFailed if a batch is not the one that is due, and
    what kept a read task from reading: DataError for a broken clip, EnvironmentFault for a storage that fails.
    """
    due = start
    whole_blocks: Any = None  # documented, but not in the signature
    blocks: Iterable[Any] = shard.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=2)
    for block in blocks:
        for i in range(len(block)):
            step, owner = block["step"][i].as_py(), block["rank"][i].as_py()
            if (step, owner) != (due, rank):
                raise TrainingFailed(
                    f"the feed gave rank {rank} step {step} of rank {owner} where step {due} was due",
                    fix="This is a fault in flam or Ray Data: run the command again, it resumes; please report it.",
                )
            if (error := block["error"][i].as_py()) is not None:
                raise unpack(error)
            pixels = np.frombuffer(block["frames"][i].as_buffer(), dtype=np.uint8)
            yield StepBatch(step, pixels.reshape(block["shape"][i].as_py()), block["ids"][i].as_py())
            due += 1


def flam_cause(error: BaseException) -> FlamError | None:
    """The flam error that an error was caused by, if any."""
    queue: list[BaseException] = [error]
    for current in queue:
        # Ray's copy of an error is of the same class too, but its message is a whole traceback.
        if isinstance(current, FlamError) and not isinstance(current, RayError):
            return current
        inner = (current.__cause__, current.__context__, getattr(current, "cause", None))
        queue += [one for one in inner if isinstance(one, BaseException) and not any(one is seen for seen in queue)]
    return None
