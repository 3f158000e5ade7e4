"""The Ray cluster that a run is on: joined or started, and large enough."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import ray

from flam_core.errors import EnvironmentFault, FlamError
from services.storage import CHAOS_SHARE
from services.training.chaos import S3_SHARE, Fault, parse_chaos
from services.training.elastic import parse_workers
from services.training.settings import TrainSettings

FEED_CPUS = 0.6
"""One read task and what tells it which: the least that Ray Data needs beside the workers."""
_OBJECT_STORE_BYTES = 1 << 30


def connect(settings: TrainSettings) -> bool:
    """Join the cluster, or start a local Ray; whether this process started it."""
    if ray.is_initialized():
        return False
    address = settings.address or os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": True}
    if any(one.fault is Fault.S3_503 for one in parse_chaos(settings.chaos)):
        os.environ[CHAOS_SHARE] = str(S3_SHARE)
        common["runtime_env"] = {"env_vars": {CHAOS_SHARE: str(S3_SHARE)}}
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else every line of a worker appears twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    cpus = max(os.cpu_count() or 1, int(parse_workers(settings.workers).most * settings.worker_cpus) + 2)
    join_or_start(address, {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES}, **common)
    return True


def join_or_start(address: str | None, local: Mapping[str, Any], **common: Any) -> None:
    """Join the cluster at `address`, else start a Ray here with the arguments `local` (`num_cpus`: logical ones).

    Raises EnvironmentFault if that cluster does not take this program, or Ray does not start.
    """
    try:
        if address:
            check_head(address)
            ray.init(address=address, **common)
        else:
            # "local": without an address Ray joins whatever was started on this machine, or tries to: what it goes by
            # is a file that outlives a head that was killed.
            ray.init(address="local", **local, **common)
    except FlamError:
        raise
    except Exception as error:  # a machine that is too busy makes Ray raise just that
        where = f"no Ray cluster at {address} takes this program" if address else "Ray does not start on this machine"
        said = str(error).partition("\n")[0]
        raise EnvironmentFault(
            f"{where}: {said}",
            fix="Check --address or RAY_ADDRESS, that Ray has the same version there, and, if the cluster asks for a "
            "token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
            if address
            else "Wait for free cores and memory; Ray's own words are in its logs (/tmp/ray/session_latest/logs).",
        ) from error


def check_head(address: str) -> None:
    """Raises EnvironmentFault if nothing listens at host:port, where Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no Ray cluster at {address}: {error.strerror or error}", fix="Check --address or RAY_ADDRESS."
        ) from error


def check_resources(settings: TrainSettings) -> None:
    """Raises EnvironmentFault if the cluster can never run this: Ray itself would wait for ever, with a warning."""
    cpus, least = ray.cluster_resources().get("CPU", 0), parse_workers(settings.workers).least
    if least * settings.worker_cpus + FEED_CPUS > cpus:
        raise EnvironmentFault(
            f"{least} workers of {settings.worker_cpus:g} CPUs leave Ray Data less than {FEED_CPUS} of the "
            f"cluster's {cpus:g} CPUs: the run would wait for ever",
            fix="Lower --workers or --worker_cpus (they are logical: 0.5 is fine), or add CPUs.",
        )
    if settings.gpu and ray.cluster_resources().get("GPU", 0) < least:
        raise EnvironmentFault(
            f"{least} GPUs asked for, the cluster has {ray.cluster_resources().get('GPU', 0):g}",
            fix="Lower --workers, leave out --gpu, or add GPUs.",
        )
    if any(one.fault is Fault.NODE_LOSS for one in parse_chaos(settings.chaos)):
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive < 2:
            raise EnvironmentFault(
                "--chaos node-loss in a cluster of one node would take the driver with it", fix="Add a node."
            )
