"""Keeps Ray Data's executor from spinning, and from running ahead with what is not wanted yet.

Its scheduling loop waits for tasks only while some are unfinished. When all that may run have run ahead of the trainer,
which is the normal state of a feed that keeps up, the loop turns without a pause and takes most of a core from the
trainer (docs/devlog.md). A sleep at each turn that brought nothing, longer the longer nothing happens, costs nothing: a
turn is milliseconds of work, and what the feed has ready lasts for longer than any of these sleeps.

Blocks of no size worth counting, as the numbers of read tasks are, are under no memory limit: Ray Data would make all
of a run's at its start. That is milliseconds each, a fifth of a core for the first minutes of a long run.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY as _POLICIES
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data import DataContext
    from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_PAUSE_SECONDS, _LONGEST_SECONDS = 0.02, 0.2
_MOST_WAITING = 32
"""Blocks between two operators: as many tasks can begin at one turn."""


def throttle(context: DataContext) -> None:
    """Let executions under `context` work on demand."""
    if Throttle not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Throttle]
    policies = context.get_config(_POLICIES, ENABLED_BACKPRESSURE_POLICIES)
    if OnDemand not in policies:
        context.set_config(_POLICIES, [*policies, OnDemand])


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


class OnDemand(BackpressurePolicy):
    """Takes nothing from the tasks of an operator while enough blocks wait for the next operator."""

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """See the class; None means no limit."""
        following = op.output_dependencies
        waiting = sum(self._topology[one].total_enqueued_input_blocks() for one in following)
        return 0 if following and waiting >= _MOST_WAITING else None
