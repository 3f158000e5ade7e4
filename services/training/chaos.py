"""Faults that a run brings upon itself (`--chaos`), so that anyone can see what it does about them.

    kill:1@40            rank 1 is killed (SIGKILL) as it begins step 40
    hang@40, hang:0@40   the last rank, or rank 0, stands still in step 40
    slow:1               rank 1 takes 50 ms longer for each step
    nan@40               the gradient of step 40 is not a number
    sigterm@40           the driver is asked to end (SIGTERM) in step 40
    corrupt-checkpoint@40  the first checkpoint from step 40 on is damaged once it is committed, and rank 0 is killed
    node-loss@40         the node of the last rank is lost (its raylet is killed) in step 40
    mlflow-down@40       MLflow cannot be reached for 30 s from step 40 on
    s3-503               a fifth of all requests to object storage is answered with 503

Each comes once in a run, however often it is resumed, but for `slow` and `s3-503`. Without @STEP it comes in step 10.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

import psutil
import torch

from flam_core.errors import SettingsError
from services.storage import Location, exists, read_bytes, write_bytes
from services.tracking.journal import Journal

_STEP = 10
_SLOW_SECONDS = 0.05
_AWAY_SECONDS = 30.0
S3_SHARE = 0.2
"""Of requests that are answered with 503."""


class Fault(Enum):
    """What may be brought about."""

    KILL = "kill"
    HANG = "hang"
    SLOW = "slow"
    NAN = "nan"
    SIGTERM = "sigterm"
    CORRUPT_CHECKPOINT = "corrupt-checkpoint"
    NODE_LOSS = "node-loss"
    MLFLOW_DOWN = "mlflow-down"
    S3_503 = "s3-503"


@dataclass(frozen=True)
class Planned:
    """One fault of a run."""

    fault: Fault
    rank: int | None
    """None: the last, for those of one rank."""
    step: int

    @property
    def name(self) -> str:
        """As it may be written, in full."""
        return f"{self.fault.value}{'' if self.rank is None else f':{self.rank}'}@{self.step}"


def parse_chaos(text: str) -> tuple[Planned, ...]:
    """The faults that `--chaos` names. Raises SettingsError, naming the word, if it names others."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([a-z0-9-]+?)(?::(\d+))?(?:@(\d+))?", word)
        known = {fault.value: fault for fault in Fault}
        if match is None or match[1] not in known:
            raise SettingsError(
                f"--chaos {word} is no fault that flam knows",
                fix=f"Use {', '.join(known)}, with :RANK and @STEP, such as kill:0@40.",
            )
        fault = known[match[1]]
        if fault in (Fault.KILL, Fault.SLOW) and match[2] is None:
            raise SettingsError(f"--chaos {word} names no rank", fix=f"Write it as {fault.value}:0.")
        found.append(Planned(fault, None if match[2] is None else int(match[2]), int(match[3] or _STEP)))
    return tuple(found)


class Chaos:
    """Brings a rank's faults about when their step comes."""

    def __init__(
        self,
        run: Location,
        faults: tuple[Planned, ...],
        rank: int,
        world: int,
        control: Any,
        journal: Journal | None,
    ) -> None:
        """journal: on rank 0. An outage of MLflow goes on that began in an earlier process."""
        self._run, self._control, self._journal = run, control, journal
        mine = [one for one in faults if self._whose(one, world) == rank]
        self._slow = any(one.fault is Fault.SLOW for one in mine)
        done = [one for one in mine if exists(self._place(one))]
        self._left = [one for one in mine if one not in done and one.fault is not Fault.SLOW]
        for one in done:
            if one.fault is Fault.MLFLOW_DOWN:
                self._cut_off(_AWAY_SECONDS - (time.time() - float(read_bytes(self._place(one)))))

    @staticmethod
    def _whose(one: Planned, world: int) -> int | None:
        """The rank that brings it about; None: all do."""
        if one.fault is Fault.S3_503:
            return None
        if one.fault in (Fault.HANG, Fault.NODE_LOSS, Fault.KILL, Fault.SLOW):
            return world - 1 if one.rank is None else one.rank
        return 0

    def _place(self, one: Planned) -> Location:
        """What says that it was brought about, and when."""
        return self._run / "chaos" / one.name

    def _due(self, step: int, fault: Fault) -> bool:
        """Whether such a fault comes now, for the first time."""
        for one in self._left:
            if one.fault is fault and step >= one.step:
                self._left.remove(one)
                write_bytes(self._place(one), str(time.time()).encode())
                print(f"chaos: {one.name} in step {step}", flush=True)
                return True
        return False

    def _cut_off(self, seconds: float) -> None:
        if self._journal is not None and seconds > 0:
            self._journal.pretend_away(seconds)

    def step(self, step: int, module: torch.nn.Module) -> None:
        """A step begins."""
        if self._slow:
            time.sleep(_SLOW_SECONDS)
        if not self._left:
            return
        if self._due(step, Fault.MLFLOW_DOWN):
            self._cut_off(_AWAY_SECONDS)
        if self._due(step, Fault.SIGTERM):
            self._control.end_driver.remote()
        if self._due(step, Fault.NAN):
            parameter = next(one for one in module.parameters() if one.requires_grad)
            handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float("nan"))[1])
        if self._due(step, Fault.HANG):
            while True:
                time.sleep(1.0)
        if self._due(step, Fault.NODE_LOSS):
            raylet = psutil.Process().parent()
            if raylet is not None:
                raylet.kill()
            time.sleep(60.0)
        if self._due(step, Fault.KILL):
            os.kill(os.getpid(), signal.SIGKILL)

    def committed(self, step: int) -> None:
        """The checkpoint after so many steps is committed."""
        if self._due(step, Fault.CORRUPT_CHECKPOINT):
            write_bytes(self._run / "checkpoints" / f"step-{step:08d}" / "model.safetensors", b"chaos")
            os.kill(os.getpid(), signal.SIGKILL)
