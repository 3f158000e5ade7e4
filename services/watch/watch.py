"""The driver's watch over its run: the lease, the ledger, stalls, and stopping."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flam_core.errors import EnvironmentFault
from services.storage import Location, write_bytes
from services.watch.beats import Beat
from services.watch.control import Look
from services.watch.gauges import Gauges
from services.watch.goodput import Goodput
from services.watch.lease import Lease
from services.watch.stall import Stall, find_stall

_SECONDS = 0.5
_STACKS_SECONDS = 5.0
_ANSWER_SECONDS = 10.0


class Watch:
    """Watches in a thread of its own, from `__init__` to `close`."""

    def __init__(
        self,
        control: Any,
        run: Location,
        goodput: Goodput,
        lease: Lease,
        *,
        stall_seconds: float,
        show: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """control: what `start_control` gave. show: is given a line that says how the run stands, now and then."""
        self.goodput = goodput
        self.why = ""
        """Why the run was told to stop; empty: it was not."""
        self._control, self._run, self._lease = control, run, lease
        self._stall_seconds, self._show = stall_seconds, show
        self._gauges = Gauges(run.path.rpartition("/")[2])
        self._look: Look | None = None
        self._killed: set[tuple[str, int]] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    @property
    def steps_run(self) -> bool:
        """Whether workers are in the midst of steps, and so able to stop by themselves."""
        look = self._look
        return look is not None and any(beat.stage not in ("load", "start", "end") for beat in look.beats.values())

    def stop(self, why: str) -> None:
        """Have all workers commit a checkpoint and end."""
        self.why = self.why or why
        self._control.stop.remote(self.why)  # at once: there may be seconds left

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=_ANSWER_SECONDS)

    def _work(self) -> None:
        told = ""
        while not self._closed.is_set():
            try:
                if self.why and told != self.why:
                    ray.get(self._control.stop.remote(self.why), timeout=_ANSWER_SECONDS)
                    told = self.why
                look = self._ask()
                self._hear(look)
                if (stall := find_stall(look.beats, look.silent, self._stall_seconds)) is not None:
                    self._end_stall(stall)
                if told and look.orders.stop != told:
                    told = ""  # the actor was started anew, and forgot
            except (RayError, GetTimeoutError):
                pass  # it is asked again in a moment
            self._lease.renew_if_due()
            with suppress(EnvironmentFault):
                self.goodput.save_if_due()
            self._closed.wait(0.05 if self.why and not told else _SECONDS)

    def _ask(self) -> Look:
        return cast(Look, ray.get(self._control.look.remote(), timeout=_ANSWER_SECONDS))

    def _hear(self, look: Look) -> None:
        self._look = look
        self.goodput.furthest = max(self.goodput.furthest, look.orders.furthest)
        self.goodput.step_seconds = look.orders.step_seconds
        for beat in look.beats.values():
            if beat.spans and beat.spans not in self.goodput.spans:
                self.goodput.spans.append(beat.spans)
        if (first := look.beats.get(0)) is not None:
            self.goodput.hear(first)
            self._gauges.set_goodput(self.goodput.totals())
            if first.line:
                self._show(f"{first.line}  [{first.stage}]")

    def _end_stall(self, stall: Stall) -> None:
        """Say who stands still, keep all stacks, and end that process: Ray Train then starts the workers anew."""
        if (stall.beat.node, stall.beat.pid) in self._killed:
            return
        if not stall.answers and not _on_its_node(stall.beat, _lives_here):
            self._killed.add((stall.beat.node, stall.beat.pid))
            return  # it is dead, which is Ray Train's to deal with
        stacks = self._stacks(len(self._look.beats) if self._look else 1)
        stall = stall.blame(stacks)
        beat = stall.beat
        self._killed.add((beat.node, beat.pid))
        reads = stacks.get(beat.rank, "").partition("\n")[0]
        place = self._run / "stalls" / f"step-{beat.step:08d}-rank-{beat.rank}-{int(time.time())}.txt"
        text = "\n\n".join(f"=== rank {rank}\n{text}" for rank, text in sorted(stacks.items()))
        with suppress(EnvironmentFault):
            write_bytes(place, f"{stall.sentence(reads)}\n\n{text}\n".encode())
        print(f"stall: {stall.sentence(reads)}; stacks of all ranks: {place}; it is ended", flush=True)
        _on_its_node(beat, _kill_here)

    def _stacks(self, ranks: int) -> dict[int, str]:
        ray.get(self._control.dump.remote(), timeout=_ANSWER_SECONDS)
        deadline = time.monotonic() + _STACKS_SECONDS
        while True:
            found = self._ask().stacks
            if len(found) >= ranks or time.monotonic() > deadline:
                return dict(found)
            time.sleep(0.1)


def _on_its_node(beat: Beat, action: Callable[[int, float], bool]) -> bool:
    """What the action says of a worker's process, from a task on its node. A node that is gone has taken it along."""
    task: Any = ray.remote(action)
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    asked = task.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return bool(ray.get(asked.remote(beat.pid, beat.process_started), timeout=_ANSWER_SECONDS))
    except (RayError, GetTimeoutError):
        return False


def _lives_here(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _kill_here(pid: int, started: float) -> bool:
    """kill -9: what hangs answers to nothing less."""
    if lives := _lives_here(pid, started):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return lives
