"""Keeps Ray Data's executor from spinning.

Its scheduling loop waits for tasks only while some are unfinished. When all that may run have run ahead of the trainer,
which is the normal state of a feed that keeps up, the loop turns without a pause and takes most of a core from the
trainer (docs/devlog.md). A sleep at each turn that brought nothing, longer the longer nothing happens, costs nothing: a
turn is milliseconds of work, and what the feed has ready lasts for longer than any of these sleeps.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_PAUSE_SECONDS, _LONGEST_SECONDS = 0.02, 0.2


class Throttle(ExecutionCallback):
    """Sleeps for a moment at each turn of the scheduling loop in which no task began or gave a block."""

    def __init__(self) -> None:
        self._seen, self._pause = -1, _PAUSE_SECONDS

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """See the class."""
        done = sum(
            op.metrics.num_tasks_submitted + op.metrics.num_task_outputs_generated for op in executor._topology or ()
        )
        if done == self._seen:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_SECONDS)
        else:
            self._pause = _PAUSE_SECONDS
        self._seen = done
