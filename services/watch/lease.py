"""Who runs a run: a lease in its folder or bucket, so that two drivers never write to one run."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import psutil

from flam_core.errors import EnvironmentFault
from services.storage import Location, exists, read_bytes, write_bytes

RENEW_SECONDS = 10.0
_FILE = "lease.json"
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """A driver that holds a lease."""

    token: str
    host: str
    """Name of the machine, and the namespace that its pid is from."""
    pid: int
    process_started: float
    renewed: int
    """How often the lease was renewed."""


class Lease:
    """The lease of this process on a run. `renew` it every `RENEW_SECONDS`; `release` it at the end."""

    def __init__(self, run: Location) -> None:
        self._place = run / _FILE
        self._mine = Holder(uuid.uuid4().hex, _host(), os.getpid(), psutil.Process().create_time(), 0)
        self._renewed_at = 0.0

    def take(self, run_id: str) -> None:
        """Take the lease. One whose driver is gone is taken over: at once on the same machine, else once it was not
        renewed for a while. Raises EnvironmentFault if another driver holds it, or the storage does not answer."""
        held = _read(self._place)
        if held is not None and _alive(held, self._place):
            raise EnvironmentFault(
                f"run {run_id} is running already: pid {held.pid} on {held.host.partition('/')[0]} holds {self._place}",
                fix=f"Follow it with jobs/train.py --follow {run_id}, stop it first, or start another with --fresh.",
            )
        self._write()
        time.sleep(_SETTLE_SECONDS)  # of two who take it at the same time, the one who wrote last has it
        now = _read(self._place)
        if now is None or now.token != self._mine.token:
            raise EnvironmentFault(
                f"run {run_id} was started by somebody else at the same moment", fix="Follow theirs, or try again."
            )

    def renew_if_due(self) -> None:
        """Say that this process still runs the run."""
        if time.monotonic() - self._renewed_at > RENEW_SECONDS:
            self._mine = replace(self._mine, renewed=self._mine.renewed + 1)
            with suppress(EnvironmentFault):  # it is tried again soon, and whoever wants the run waits for longer
                self._write()

    def release(self) -> None:
        """Give it back."""
        with suppress(EnvironmentFault, OSError):
            held = _read(self._place)
            if held is not None and held.token == self._mine.token:
                self._place.fs.delete_file(self._place.path)

    def _write(self) -> None:
        write_bytes(self._place, json.dumps(asdict(self._mine)).encode())
        self._renewed_at = time.monotonic()


def held(run: Location) -> bool:
    """Whether somebody runs that run, as far as can be told at once."""
    found = _read(run / _FILE)
    return found is not None and (found.host != _host() or _process_lives(found))


def _read(place: Location) -> Holder | None:
    """None without a lease; one that cannot be read is none."""
    if not exists(place):
        return None
    try:
        return Holder(**json.loads(read_bytes(place)))
    except (ValueError, TypeError):
        return None


def _alive(holder: Holder, place: Location) -> bool:
    if holder.host == _host():
        return _process_lives(holder)
    print(f"{place} is held from another machine: waiting whether it is renewed", flush=True)
    deadline = time.monotonic() + 2.5 * RENEW_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = _read(place)
        if now is None:
            return False
        if (now.token, now.renewed) != (holder.token, holder.renewed):
            return True
    return False


def _process_lives(holder: Holder) -> bool:
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.process_started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _host() -> str:
    """The machine and the namespace of its process ids: containers may share a name."""
    with suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
