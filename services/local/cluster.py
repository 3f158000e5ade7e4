"""Starts the parts of a local cluster, and stops exactly what it started."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import requests

from flam_core.errors import EnvironmentFault
from services.local.parts import BUCKET, Layout, Part, parts_of, settled_ports
from services.local.secrets import secrets_of, write_private
from services.local.settings import LocalSettings
from services.local.sockets import ray_folder

ENV_FILE = "env"
MARK = "FLAM_CLUSTER_PART"
_STATE = "state.json"
_READY_SECONDS = 180.0
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Running:
    """A part that was started."""

    name: str
    pid: int
    created: float
    """When its process began, by the system: another process may have its pid by now."""
    url: str
    log: str
    mark: str = ""
    """In the environment of all that it starts."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process() is not None

    def process(self) -> psutil.Process | None:
        """Its process, unless it has ended."""
        with suppress(psutil.Error):
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.created) < 1 and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None

    def rest(self) -> list[psutil.Process]:
        """All others of its session: what it started and what these did, also when it has ended itself.

        A session has the number of the process that began it, which nobody else gets while one of the session is left.
        That it is this part's own, and no later one of the same number, is told by that process, or by the mark of any
        of them (some lose theirs: who writes a title into its command line overwrites its environment).
        """
        inside = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != self.pid and os.getsid(process.pid) == self.pid:
                    inside.append(process)
        return inside if self.alive or any(self._marked(one) for one in inside) else []

    def _marked(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return bool(self.mark) and process.environ().get(MARK) == self.mark
        return False


def running(folder: Path) -> list[Running]:
    """What was started from `folder` and not taken down, whether it still runs or not."""
    place = folder / _STATE
    return [Running(**one) for one in json.loads(place.read_text())] if place.exists() else []


def bring_up(settings: LocalSettings, home: Path, say: Callable[[str], None] = print) -> list[Running]:
    """Start all parts, or find them running; returns when each answers.

    home: what relative paths in jobs mean. Raises EnvironmentFault if a port is taken, a program is missing, a part
    does not answer (then all are stopped again) or has died since it was started.
    """
    folder = Path(settings.folder).absolute()
    if known := running(folder):
        if dead := [one for one in known if not one.alive]:
            raise EnvironmentFault(
                f"the cluster in {folder} was started, and {', '.join(one.name for one in dead)} has ended since: see "
                f"{', '.join(one.log for one in dead)}",
                fix="make cluster-down, then make cluster.",
            )
        return known
    secrets = secrets_of(folder)
    for name in ("logs", "mlflow"):
        (folder / name).mkdir(exist_ok=True)
    ray_files = ray_folder(folder)
    shutil.rmtree(ray_files, ignore_errors=True)  # of the last time
    layout = Layout(home.absolute(), folder, settled_ports(settings), secrets, ray_files)
    started: list[Running] = []
    try:
        for part in (parts := parts_of(settings, layout)):
            started.append(_start(part, folder / "logs" / f"{part.name}.txt"))
            write_private(folder / _STATE, json.dumps([asdict(one) for one in started], indent=1))
        for part, one in zip(parts, started, strict=True):
            _wait(part, one)
            say(f"{one.name} answers at {one.url}")
        _make_bucket(layout)
    except BaseException:
        take_down(folder, lambda _line: None)
        raise
    lines = [f"export {name}={shlex.quote(value)}" for name, value in layout.for_users.items()]
    write_private(folder / ENV_FILE, "\n".join([*lines, ""]))
    return started


def take_down(folder: Path, say: Callable[[str], None] = print) -> None:
    """End what `bring_up` started from `folder`, by pid, and nothing else. Secrets, logs, MLflow's database and
    artifacts stay; what the S3 server had is gone."""
    known = running(folder)
    for one in reversed(known):
        process, rest = one.process(), one.rest()
        if process is not None:
            _end([process], rest)
            say(f"{one.name} (pid {one.pid}) has ended")
        else:
            _end(rest, [])
            say(f"{one.name} had ended already" + (f"; {len(rest)} that it had started have ended now" if rest else ""))
    for name in (_STATE, ENV_FILE):
        (folder / name).unlink(missing_ok=True)


def _start(part: Part, log: Path) -> Running:
    mark = uuid.uuid4().hex
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command,
            env={**part.environment, MARK: mark},
            cwd=part.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives this program, and Ctrl-C is not meant for it
        )
    try:
        created = psutil.Process(process.pid).create_time()
    except psutil.Error:
        created = time.time()  # it has ended: `_wait` says so, with its log
    return Running(part.name, process.pid, created, part.url, str(log), mark)


def _wait(part: Part, one: Running) -> None:
    deadline, why = time.monotonic() + _READY_SECONDS, "it has ended"
    while one.alive:
        with suppress(requests.RequestException):
            # Past a proxy of the environment, which need not know this machine's addresses.
            if requests.get(part.health, headers=part.headers, timeout=5, proxies={"http": ""}).status_code == 200:
                return
        if time.monotonic() > deadline:
            why = f"it does not answer after {_READY_SECONDS:.0f} s"
            break
        time.sleep(0.3)
    lines = [line for line in Path(one.log).read_text(errors="replace").splitlines() if line.strip()]
    last = f"; its last line: {lines[-1].strip()}" if lines else ""
    raise EnvironmentFault(f"{one.name} did not start: {why}{last}", fix=f"See {one.log}.")


def _make_bucket(layout: Layout) -> None:
    client: Any = boto3.client(
        "s3",
        endpoint_url=layout.url("s3_port"),
        aws_access_key_id=layout.secrets.s3_access_key,
        aws_secret_access_key=layout.secrets.s3_secret_key,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)


def _end(asked: list[psutil.Process], rest: list[psutil.Process]) -> None:
    """Processes and all that these started: those that are asked first politely."""
    tree = [*asked, *rest]
    for one in asked:
        with suppress(psutil.Error):
            tree += one.children(recursive=True)
    for one in asked:
        with suppress(psutil.Error):
            one.terminate()
    _, left = psutil.wait_procs(asked, _END_SECONDS)
    for one in {*left, *tree}:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(tree, _END_SECONDS)
