"""The feed's batches without Ray: for short runs that share a machine, such as a study's."""

from __future__ import annotations

from collections.abc import Generator
from itertools import count

from flam_core.errors import unpack
from services.feed.assemble import Assembler, StepBatch
from services.feed.plan import FeedPlan
from services.feed.read import Chunk, read_or_say


def local_steps(plan: FeedPlan, start: int, assembler: Assembler, rank: int = 0) -> Generator[StepBatch, None, None]:
    """The batches of a rank from step `start` on, read in this process: byte for byte those of `stream.steps_of`.

    Raises what keeps a chunk from being read: EnvironmentFault for a storage that fails.
    """
    for number in count():
        steps = plan.chunk(start, number)
        if not steps:
            return
        chunk = read_or_say(plan, Chunk(rank, steps, begins=number == 0), None)
        if (error := chunk["error"][0].as_py()) is not None:
            raise unpack(error)
        assembler.add(chunk["clips"][0].values, chunk["counters"][0].as_py())
        yield from assembler.batches(steps)
