"""A worker's heart: says what the worker does, hears what it is told, and adds up where its time goes."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError

from services.watch.beats import Beat, Bucket, Orders, Stage, bucket_of
from services.watch.machine import Machine
from services.watch.spans import Spans

_SECONDS = 1.0
_WORKERS_A_SECOND = 100
"""That the actor hears at most."""
_MACHINE_SECONDS = 10.0


class Heart:
    """Beats in a thread of its own from `__init__` to `close`. `stage` and `step` are cheap enough for every step."""

    def __init__(
        self,
        control: Any,
        rank: int,
        world: int,
        *,
        local_rank: int = 0,
        describe: Callable[[int], str] = lambda _step: "",
        spans: Spans | None = None,
    ) -> None:
        """control: what `start_control` gave. describe: says what a step reads, for the sentence about a stall."""
        self.rank, self.world = rank, world
        self.line = ""
        """What the log last said."""
        self._control, self._describe, self._spans = control, describe, spans
        self._machine = Machine() if local_rank == 0 else None
        self._interval = max(_SECONDS, world / _WORKERS_A_SECOND)
        self._node, self._host = ray.get_runtime_context().get_node_id(), socket.gethostname()
        self._process_started = psutil.Process().create_time()
        self._stage: Stage = "load"
        self._step = 0
        self._since = self._step_began = time.monotonic()
        self._seconds: defaultdict[Bucket, float] = defaultdict(float)
        self._steps: deque[float] = deque(maxlen=50)
        self._closed = threading.Event()
        self._machine_at = 0.0
        self.furthest = -1
        """The furthest step begun before this worker: up to it, steps are done again."""
        self.orders: Orders = ray.get(control.join.remote(self._beat()))
        self.furthest = self.orders.furthest
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    @property
    def stop(self) -> str:
        """Why the worker is to commit a checkpoint and end; empty: it is not."""
        return self.orders.stop

    def stage(self, stage: Stage) -> None:
        """The worker goes on to another stage."""
        now = time.monotonic()
        took = now - self._since
        self._seconds[bucket_of(self._stage, again=self._step < self.furthest)] += took
        if self._spans is not None:
            self._spans.add(self._stage, self._step, took)
        self._stage, self._since = stage, now

    def begins(self, step: int) -> int:
        """The worker has its weights and will begin with that step. Gives how many steps are done again."""
        self.stage("start")
        self._step = step
        return max(0, self.furthest - step)

    def step(self, step: int) -> None:
        """The worker waits for the data of a step."""
        self.stage("data")
        if self._step < step:
            self._steps.append(self._since - self._step_began)
        self._step, self._step_began = step, self._since

    def seconds(self) -> dict[Bucket, float]:
        """Where the time went so far."""
        found = dict(self._seconds)
        bucket = bucket_of(self._stage, again=self._step < self.furthest)
        found[bucket] = found.get(bucket, 0.0) + time.monotonic() - self._since
        return found

    def close(self) -> None:
        """Say a last time what was done, and end the thread."""
        self.stage("end")
        self._closed.set()
        with suppress(RayError, GetTimeoutError):  # without a driver nobody is left to hear it
            ray.get(self._control.beat.remote(self._beat(), 0.0), timeout=10)
        if self._spans is not None:
            self._spans.flush()

    def _beat(self) -> Beat:
        machine = {}
        if self._machine is not None and time.monotonic() - self._machine_at > _MACHINE_SECONDS:
            machine, self._machine_at = self._machine.look(), time.monotonic()
        return Beat(
            self.rank,
            self.world,
            self._node,
            self._host,
            os.getpid(),
            self._process_started,
            self._step,
            self._stage,
            time.monotonic() - self._since,
            statistics.median(self._steps) if self._steps else 0.0,
            self.seconds(),
            self.line,
            machine,
            self._spans.name if self._spans is not None else "",
        )

    def _run(self) -> None:
        dumped = self.orders.dump
        while not self._closed.is_set():
            try:
                asked = self._control.beat.remote(self._beat(), self._interval)
                self.orders = ray.get(asked, timeout=self._interval + 30)
                if self.orders.dump > dumped:
                    dumped = self.orders.dump
                    ray.get(self._control.stacks.remote(self.rank, self._stacks()), timeout=10)
            except (RayError, GetTimeoutError):
                self._closed.wait(self._interval)  # the actor starts again, or the driver is gone and Ray ends this too
            if self._spans is not None:
                self._spans.flush_if_due()

    def _stacks(self) -> str:
        """Of all threads of this process, and what the step in hand reads."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = [self._describe(self._step)]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                parts.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
        return "\n".join(parts)
