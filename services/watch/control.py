"""The actor of a run through which its driver and its workers hear of each other."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flam_core.errors import EnvironmentFault
from services.watch.beats import Beat, Orders

NAMESPACE = "flam"


@dataclass(frozen=True)
class Look:
    """What is known of all workers."""

    beats: Mapping[int, Beat]
    silent: Mapping[int, float]
    """Seconds since each rank was last heard."""
    stacks: Mapping[int, str]
    """Of the ranks that answered the last question for them."""
    orders: Orders
    failure: str
    """The error that ended the run, packed; empty: none did."""


class Control:
    """One for each run, by the name `flam-<run id>`. It keeps what it is told, and passes it on."""

    def __init__(self, driver: int, furthest: int, step_seconds: float) -> None:
        self._driver = driver
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._stacks: dict[int, str] = {}
        self._orders = Orders(furthest=furthest, step_seconds=step_seconds)
        self._failure = ""
        self._changed = asyncio.Condition()

    async def join(self, beat: Beat) -> Orders:
        """A worker begins: whoever had its rank before is gone, and with rank 0 a new group begins."""
        if beat.rank == 0:
            self._beats, self._heard = {}, {}
            self._orders = replace(self._orders, machines={})
        self._note(beat)
        return self._orders

    async def beat(self, beat: Beat, seconds: float) -> Orders:
        """A worker is alive. Answers after `seconds`, or at once when there are new orders."""
        self._note(beat)
        before = self._orders.stop, self._orders.dump
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: (self._orders.stop, self._orders.dump) != before), seconds
                )
        return self._orders

    def _note(self, beat: Beat) -> None:
        self._beats[beat.rank], self._heard[beat.rank] = beat, time.monotonic()
        if beat.stage not in ("load", "start", "end"):
            self._orders = replace(self._orders, furthest=max(self._orders.furthest, beat.step))
        if beat.rank == 0 and beat.median_step_seconds:
            self._orders = replace(self._orders, step_seconds=beat.median_step_seconds)
        if beat.machine:
            nodes = list(dict.fromkeys(known.node for _, known in sorted(self._beats.items())))
            name = f"node-{nodes.index(beat.node)}"
            self._orders = replace(self._orders, machines={**self._orders.machines, name: beat.machine})

    async def stop(self, why: str) -> None:
        """Tell all workers to commit a checkpoint and end."""
        await self._order(replace(self._orders, stop=self._orders.stop or why))

    async def dump(self) -> None:
        """Ask all workers for their stacks."""
        self._stacks = {}
        await self._order(replace(self._orders, dump=self._orders.dump + 1))

    async def _order(self, orders: Orders) -> None:
        async with self._changed:
            self._orders = orders
            self._changed.notify_all()

    async def stacks(self, rank: int, text: str) -> None:
        """A worker's answer to `dump`."""
        self._stacks[rank] = text

    async def fail(self, packed: str) -> None:
        """A worker met an error (`flam_core.errors.pack`) that would come again: the run is to end."""
        self._failure = self._failure or packed

    async def failure(self) -> str:
        """That error; empty: there is none."""
        return self._failure

    async def end_driver(self) -> None:
        """SIGTERM to the driver, which runs on this node (`--chaos sigterm`)."""
        os.kill(self._driver, signal.SIGTERM)

    async def look(self) -> Look:
        """What is known of all workers."""
        now = time.monotonic()
        silent = {rank: now - heard for rank, heard in self._heard.items()}
        return Look(dict(self._beats), silent, dict(self._stacks), self._orders, self._failure)


def start_control(run_id: str, *, furthest: int = -1, step_seconds: float = 0.0) -> Any:
    """The handle of the run's actor, which lives as long as this driver.

    furthest, step_seconds: what is known from before (`Orders`).

    Raises EnvironmentFault if the run has one: it is running in this cluster.
    """
    actor: Any = ray.remote(Control)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        handle = actor.options(
            name=f"flam-{run_id}",
            namespace=NAMESPACE,
            scheduling_strategy=here,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
        ).remote(os.getpid(), furthest, step_seconds)
    except (ActorAlreadyExistsError, ValueError) as error:
        raise EnvironmentFault(
            f"run {run_id} is running in this cluster already",
            fix=f"Follow it with jobs/train.py --follow {run_id}, or start another with --fresh.",
        ) from error
    ray.get(handle.look.remote())
    return handle
