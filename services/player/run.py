"""Starts the player on Ray Serve, on a Ray of its own or on a cluster, and ends it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client  # what `serve.start` found, which it does not return
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from flam_core.errors import EnvironmentFault, SettingsError, unpack
from services.player.deployments import Door, Inference, Scenes
from services.player.guard import Access
from services.player.settings import Binding, PlayerSettings
from services.player.token import choose_token, digest
from services.tracking.server import default_tracking_uri
from services.training.cluster import join_or_start

_NAME = "flam-player"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CPUS = 4
"""Logical ones of a Ray of its own, or what it needs: processes wait for one another more than they compute."""
_OBJECT_STORE_BYTES = 128 << 20
_MODEL_CPUS, _DOOR_CPUS = 0.5, 0.1
"""Of each process with a model, and of the one that answers HTTP."""
_START_SECONDS = 300.0
_FAULTS = (RayError, RayServeException, RuntimeError, TimeoutError)
"""What Ray and Serve raise where something outside is wrong."""
# Requests are not logged. Of warnings, Serve has many where cores are few, and none that a user could act on.
_LOGGING = LoggingConfig(log_level="ERROR", enable_access_log=False)


@dataclass(frozen=True)
class Place:
    """Where the player answers."""

    url: str
    token: str | None

    @property
    def link(self) -> str:
        """For a browser; it lets whoever has it in."""
        return self.url if self.token is None else f"{self.url}?token={self.token}"


@contextmanager
def player(settings: PlayerSettings, binding: Binding) -> Iterator[Place]:
    """A player that is up, until the end of the block.

    Raises SettingsError, DataError or EnvironmentFault for a model, data or a port that cannot be had, EnvironmentFault
    for a cluster that is too small or does not start the processes.
    """
    # Who else reaches a cluster's head is not for this program to know, whatever host it asks for.
    shared = ray.is_initialized() or bool(_cluster(binding))
    token = None if binding.no_token else choose_token(binding.token, binding.host, shared=shared)
    hosts = (*_LOOPBACK, binding.host.strip("[]"), *binding.allow_host)
    access = Access(None if token is None else digest(token), None if token or binding.no_token else hosts)
    settings = _absolute(settings)
    tracking = settings.tracking or default_tracking_uri(Path(os.environ.get("FLAM_HOME", ".")).absolute())
    for address in (settings.model, settings.challenger):
        if address is not None:
            _check_model(address, tracking)
    started = _connect(binding, settings)
    deployed = False
    try:
        with _told():
            check_resources(settings)
            http: dict[str, Any] = {"host": binding.host, "port": binding.port}
            serve.start(http_options=http, proxy_location="HeadOnly", logging_config=_LOGGING)
            # On a cluster Serve may have run before, and then listens where it did.
            client = _get_global_client()
            assert client is not None  # it has started
            check_serve(client.http_config, serve.status().applications, binding)
            deployed = True
            target = serve.RunTarget(_app(settings, access, tracking), name=_NAME, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)  # it would wait without end
            _wait_until_running(_START_SECONDS)
            client.wait_for_proxies_serving()
            failed = serve.get_app_handle(_NAME).ready.remote().result(timeout_s=_START_SECONDS)
        if failed is not None:
            raise unpack(failed)
        shown = "127.0.0.1" if binding.host in ("0.0.0.0", "::") else binding.host
        yield Place(f"http://{f'[{shown}]' if ':' in shown else shown}:{binding.port}/", token)
    finally:
        _end(started, deployed)


def _end(started: bool, deployed: bool) -> None:
    try:
        if started:
            serve.shutdown()
            ray.shutdown()
        elif deployed:
            serve.delete(_NAME)
    except _FAULTS as error:  # the cluster is gone, say: what the player itself ended with says more
        logging.getLogger(__name__).warning("the player could not be taken off the cluster: %s", _shortly(str(error)))


def needed(settings: PlayerSettings) -> dict[str, float]:
    """What Ray must have for all processes, by its names."""
    models = 1 + settings.replicas  # that of the scenes, and those of the API
    return {"CPU": _DOOR_CPUS + _MODEL_CPUS * models, "GPU": settings.gpus * models}


def check_resources(settings: PlayerSettings) -> None:
    """Raises EnvironmentFault if the cluster can never run this: Serve itself would wait for ever."""
    there = ray.cluster_resources()
    for kind, need in needed(settings).items():
        if need > there.get(kind, 0.0):
            raise EnvironmentFault(
                f"the player's {1 + settings.replicas} processes with a model need {need:g} {kind}s in all, and the "
                f"cluster has {there.get(kind, 0.0):g}: they would wait for ever",
                fix="Lower --replicas, or --gpus (of each process: 0.5 lets two share one, 0 takes none), or add GPUs."
                if kind == "GPU"
                else "Lower --replicas, or add CPUs.",
            )


def _wait_until_running(seconds: float) -> None:
    """Raises EnvironmentFault if the processes are not up by then, or Serve has given them up."""
    deadline = time.monotonic() + seconds
    while True:
        found = serve.status().applications.get(_NAME)
        if found is None:
            raise _not_started("somebody else took them off the cluster")
        if found.status == ApplicationStatus.RUNNING:
            return
        said = " ".join(filter(None, (found.message, *(one.message for one in found.deployments.values()))))
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise _not_started(said)
        if time.monotonic() > deadline:
            raise _not_started(f"they are not up after {seconds:g} s. {said}".rstrip())
        time.sleep(0.2)


@contextmanager
def _told() -> Iterator[None]:
    """Raises EnvironmentFault for what Ray or Serve meet inside."""
    try:
        yield
    except _FAULTS as error:
        raise _not_started(str(error) or type(error).__name__) from error


def _not_started(why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"Ray Serve does not start the player's processes: {_shortly(why)}",
        fix="All nodes need this flam and its packages installed, and room beside what else runs there (`ray status`); "
        "Serve's logs say more (/tmp/ray/session_latest/logs/serve, on the cluster's nodes).",
    )


def _shortly(said: str) -> str:
    """Its first line and its last: of a traceback, that is what and why."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys(lines[:1] + lines[-1:])).rstrip(".")


def check_serve(http: HTTPOptions, applications: Collection[str], binding: Binding) -> None:
    """Raises EnvironmentFault if Serve listens elsewhere than the player is to, or has a player already."""
    there, wanted = (http.host, http.port, http.root_path), (binding.host, binding.port, "")
    if there != wanted:
        raise EnvironmentFault(
            f"Ray Serve runs on this cluster already, and listens on {http.host}:{http.port}{http.root_path}, not on "
            f"{binding.host}:{binding.port}",
            fix="Give the --host and --port that it has, or end it with `serve shutdown` on the cluster's head, which "
            "ends all that it serves.",
        )
    if _NAME in applications:
        raise EnvironmentFault(
            f"this cluster has a player already, the Serve application {_NAME}",
            fix="End the program that started it (Ctrl-C). If that is gone, on the cluster's head: python -c "
            f"\"import ray; from ray import serve; ray.init('auto'); serve.delete('{_NAME}')\".",
        )


def wait() -> None:
    """Until the program is told to end, by SIGINT or SIGTERM: then raises KeyboardInterrupt."""
    # A shell that starts it in the background lets it ignore the one, and Ray has put its own for the other.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.default_int_handler)
    threading.Event().wait()


def _check_model(address: str, tracking: str) -> None:
    """What can be told at once, before Ray has started. Raises DataError if there is no model, EnvironmentFault if
    MLflow does not answer."""
    if address.startswith("models:/"):
        from services.registry.follow import Followed

        Followed(address, tracking).now()
    else:
        from flam_core.saved_model import model_folder, saved_sha256

        saved_sha256(model_folder(address))


def _app(settings: PlayerSettings, access: Access, tracking: str) -> Any:
    limits = settings.limits
    actor = {"num_cpus": _MODEL_CPUS, "num_gpus": settings.gpus}
    # The door bounds what waits in it (`Guard`) and in the others (`Line`), in JSON, which Serve would not answer in.
    room = {"max_ongoing_requests": 10 * limits.queue}
    scenes = _deployment(Scenes, actor, **room)
    inference = _deployment(Inference, actor, num_replicas=settings.replicas, **room)
    door = _deployment(Door, {"num_cpus": _DOOR_CPUS}, **room)
    return door.bind(settings, access, scenes.bind(settings, tracking), inference.bind(settings, tracking))


def _deployment(kind: type, actor: dict[str, Any], **options: Any) -> Any:
    return serve.deployment(kind, ray_actor_options=actor, logging_config=_LOGGING, **options)


def _cluster(binding: Binding) -> str | None:
    """The address of the cluster that is to be joined; None: there is none."""
    return binding.address or os.environ.get("RAY_ADDRESS") or None


def _connect(binding: Binding, settings: PlayerSettings) -> bool:
    """Join the cluster, or start a Ray; whether this process started it."""
    address = _cluster(binding)
    if ray.is_initialized():
        return False
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not address:
        _check_port(binding)
    cpus = max(_CPUS, math.ceil(needed(settings)["CPU"]))
    local = {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    join_or_start(address, local, logging_level=logging.WARNING)
    return not address


def _check_port(binding: Binding) -> None:
    """Raises EnvironmentFault if the port cannot be listened on: Serve would say so in many lines."""
    family = socket.AF_INET6 if ":" in binding.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((binding.host.strip("[]"), binding.port))
    except OSError as error:
        raise EnvironmentFault(
            f"cannot listen on {binding.host}:{binding.port}: {error.strerror or error}",
            fix="End what listens there, or choose another --port.",
        ) from error


def _absolute(settings: PlayerSettings) -> PlayerSettings:
    """Folders as the server's processes find them."""

    def whole(address: str | None) -> str | None:
        if address is None or ":/" in address or "," in address:
            return address
        return str(Path(address).absolute())

    model = whole(settings.model)
    if not model:
        raise SettingsError("no model is given", fix="Give its address, such as models:/flam-grid@champion.")
    return replace(settings, model=model, challenger=whole(settings.challenger), data=whole(settings.data))
