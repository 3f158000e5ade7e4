"""One Ray Data execution per run: plan rows in, contiguous uint8 batches out, in order."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from flam_core.errors import FlamError, TrainingFailed, unpack
from services.feed.assemble import Assembler, StepBatch
from services.feed.plan import FeedPlan
from services.feed.read import Chunk, read_or_say
from services.feed.throttle import throttle
from services.storage.cache import shared_cache


def make_dataset(
    plan: FeedPlan, start: int, *, task_cpus: float, cache: CacheSettings | None = None
) -> ray.data.Dataset:
    """The data set of all steps from `start` on. A row, and a block, is what one read task gives to one rank."""
    tasks = math.ceil((plan.total_steps - start) / plan.chunk_steps) * plan.world
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    throttle(context)
    plan.mixtures()  # data that do not suffice are reported here, not from a task
    # One row is one block, which is one task. Ray puts every input block into its store before it begins, and 20,000 of
    # them are a minute: so there are few, which a step that needs hardly any CPU takes apart as the tasks want them.
    context.target_max_block_size = 1
    blocks = [
        pa.table({"id": np.arange(first, min(first + _NUMBERS_A_BLOCK, tasks))})
        for first in range(0, tasks, _NUMBERS_A_BLOCK)
    ]
    numbers = ray.data.from_arrow(blocks).map_batches(
        _as_it_is, batch_size=1, batch_format="pyarrow", num_cpus=_NUMBERS_CPUS
    )
    return numbers.map_batches(
        partial(_read, plan=ray.put(plan), start=start, cache=cache),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=task_cpus,
        zero_copy_batch=True,
    )


_NUMBERS_A_BLOCK = 256
_NUMBERS_CPUS = 0.1


@dataclass(frozen=True)
class CacheSettings:
    """A cache of row groups on the disk of each node, for data that come from a bucket."""

    folder: str
    max_bytes: int


def _as_it_is(batch: pa.Table) -> pa.Table:
    return batch


def _read(batch: pa.Table, plan: Any, start: int, cache: CacheSettings | None) -> pa.Table:
    known = _get(plan)
    number, rank = divmod(batch["id"][0].as_py(), known.world)
    chunk = Chunk(rank, known.chunk(start, number), begins=number == 0)
    return read_or_say(known, chunk, shared_cache(Path(cache.folder), cache.max_bytes) if cache else None)


def _get(reference: Any) -> FeedPlan:
    return ray.get(reference)


def steps_of(
    shard: ray.data.DataIterator, plan: FeedPlan, start: int, assembler: Assembler, rank: int
) -> Generator[StepBatch, None, None]:
    """The batches of rank `rank` from step `start` on, made by its `assembler`.

    Order is checked against the plan, never assumed. Raises TrainingFailed if a chunk is not the one that is due, and
    what kept a read task from reading: EnvironmentFault for a storage that fails.
    """
    whole_blocks: Any = None  # documented, but not in the signature
    blocks: Iterable[Any] = shard.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=1)
    number = 0
    for block in blocks:
        for i in range(len(block)):
            steps = plan.chunk(start, number)
            got = block["first_step"][i].as_py(), block["rank"][i].as_py()
            if got != (steps.start, rank):
                raise TrainingFailed(
                    f"the feed gave rank {rank} step {got[0]} of rank {got[1]} where step {steps.start} was due",
                    fix="This is a fault in flam or Ray Data: run the command again, it resumes; please report it.",
                )
            if (error := block["error"][i].as_py()) is not None:
                raise unpack(error)
            assembler.add(block["clips"][i].values, block["counters"][i].as_py())
            number += 1
            yield from assembler.batches(steps)


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
