"""What a node says of itself. Runs there, as a Ray task."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from flam_core.errors import EnvironmentFault, FlamError
from services.doctor.finding import last_line
from services.storage import Location, exists, read_bytes, resolve, write_bytes
from services.tracking.probe import write_and_read
from services.tracking.server import check_server

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "mlflow", "safetensors")
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class NodeReport:
    """Of one node."""

    host: str
    python: str
    versions: dict[str, str]
    """Of `PACKAGES`; "missing" where there is none."""
    clock: float
    """Unix time when it answered."""
    shm_bytes: int
    """Size of /dev/shm; 0 where there is none."""
    disk_free: float
    """Share of the disk below Ray's files that is free."""
    disk_free_gb: float
    storage: str
    """Why it cannot write, read and delete in the storage; empty if it can."""
    tracking: str
    """Why MLflow does not take a run and an artifact from it; empty if it does."""


def report(ray_files: str, storage: str, tracking: str) -> NodeReport:
    """Of the node that this runs on."""
    disk = shutil.disk_usage(ray_files if Path(ray_files).exists() else "/")
    return NodeReport(
        host=socket.gethostname(),
        python=platform.python_version(),
        versions=versions(),
        clock=time.time(),
        shm_bytes=shutil.disk_usage(_SHM).total if _SHM.exists() else 0,
        disk_free=disk.free / disk.total,
        disk_free_gb=disk.free / 1e9,
        storage=_why_not(lambda: write_read_delete(storage)),
        tracking=_why_not(lambda: _write_a_run(tracking)),
    )


def versions() -> dict[str, str]:
    """Of `PACKAGES`, here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def write_read_delete(address: str) -> None:
    """An object at `address`, and back to as it was. Raises EnvironmentFault for what the storage refuses."""
    place = resolve(address) / f".doctor-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    content = b"doctor " * 100
    write_bytes(place, content)
    found = read_bytes(place)
    try:
        delete(place)
    except (OSError, ClientError, BotoCoreError) as error:
        raise EnvironmentFault(
            f"{place} can be written and not deleted: {last_line(error)}",
            fix="Let the user delete objects there too: checkpoints that are not kept are deleted.",
        ) from error
    if found != content:
        raise EnvironmentFault(f"{place} gives other bytes than were written", fix="Check the store.")
    if exists(place):
        raise EnvironmentFault(f"{place} is still there after it was deleted", fix="Check the store.")


def delete(place: Location) -> None:
    """Of a bucket too, nothing is left: pyarrow would put an empty object in place of the folder above."""
    if place.local:
        place.fs.delete_file(place.path)
    else:
        bucket, _, key = place.path.partition("/")
        boto3.client("s3").delete_object(Bucket=bucket, Key=key)


def _write_a_run(tracking: str) -> None:
    """A server is also asked what takes a password: its /health answers anyone. A file is the driver's alone."""
    if tracking.startswith("http"):
        write_and_read(tracking)
    else:
        check_server(tracking)


def _why_not(trial: Callable[[], object]) -> str:
    try:
        trial()
    except FlamError as error:
        return str(error)
    return ""
