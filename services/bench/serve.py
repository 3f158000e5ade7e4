"""`jobs/bench.py serve`: how many requests a player answers, how long each takes, and how fast a scene is played."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch

from flam_core.data.ingest import ingest_world
from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.model import Flam
from flam_core.recipes import get_recipe
from flam_core.saved_model import save_model
from flam_core.worlds import make_world
from services.player.run import Place, player
from services.player.settings import Binding, PlayerSettings
from services.player.wire import frames_to_text
from services.storage import resolve

_WARM_UP_SECONDS = 1.0
_MOST_CLIENTS, _MOST_SECONDS = 64, 120.0


@dataclass(frozen=True)
class ServeBenchSettings:
    """What is asked, how often. The server is one of its own on a loopback address; nothing else is ever asked."""

    model: str | None = None
    """A model; default: an untrained one of the recipe, which takes as long."""
    data: str | None = None
    """Its data set; default: a small one of `grid` that is made for the run."""
    recipe: str = "tiny"
    """Of flam_core/recipes.py."""
    clients: tuple[int, ...] = (1, 8, 32)
    """That ask at the same time, each for the next thing when it has the last."""
    seconds: float = 10.0
    """For which each is measured."""
    clip_frames: int = 10
    """Of a clip whose latent actions are inferred."""
    replicas: int = 1
    """Processes that answer."""
    threads: int = 1
    """Of PyTorch in each."""

    def __post_init__(self) -> None:
        if not self.clients or not all(1 <= one <= _MOST_CLIENTS for one in self.clients):
            raise SettingsError(f"clients {self.clients}", fix=f"Choose 1 to {_MOST_CLIENTS}.")
        if not 0 < self.seconds <= _MOST_SECONDS:
            raise SettingsError(f"seconds {self.seconds:g}", fix=f"Choose up to {_MOST_SECONDS:g}.")


@dataclass
class _Load:
    """What came of a load."""

    seconds: list[float] = field(default_factory=list)
    """Of each request that was answered."""
    busy: int = 0
    """Requests that were told to come again."""


def bench_serve(settings: ServeBenchSettings) -> dict[str, Any]:
    """Frames a second of a scene that is played by one: by a code, by an arrow, which looks ahead, and by an arrow with
    a challenger beside it. Requests a second, and the median and 99th percentile of their milliseconds, for one-step
    rollouts and for the actions of a clip, at each number of clients.

    Raises EnvironmentFault if the server answers with anything but success or "busy".
    """
    with tempfile.TemporaryDirectory(prefix="flam-serve-") as name:
        model, data = _subjects(settings, Path(name))
        served = PlayerSettings(model=model, data=data, replicas=settings.replicas, threads=settings.threads)
        begun = time.monotonic()
        with player(served, Binding(port=_free_port())) as place:
            found: dict[str, Any] = {"start_seconds": time.monotonic() - begun}
            server = _Server(place)
            played = {"code": server.play(settings.seconds), "arrow": server.play(settings.seconds, arrow=True)}
            loads = _measure(settings, server)
        # The same model again takes as long as another.
        with player(replace(served, challenger=model), Binding(port=_free_port())) as place:
            played["arrow_with_challenger"] = _Server(place).play(settings.seconds, arrow=True)
        return {**found, "played_frames_per_second": played, **loads}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Server:
    """The one that is measured."""

    def __init__(self, place: Place) -> None:
        self.url, self._token = place.url, place.token
        with self.session() as session:
            answer = session.get(f"{self.url}api", timeout=60)
            _checked(answer)
            self.model: dict[str, Any] = answer.json()["model"]

    def session(self) -> requests.Session:
        """A connection of its own."""
        session = requests.Session()
        session.trust_env = False  # no proxy is asked for what is on this machine
        if self._token is not None:
            session.headers["authorization"] = f"Bearer {self._token}"
        return session

    def play(self, seconds: float, *, arrow: bool = False) -> float:
        """Steps a second of one scene, each asked for when the last has come."""
        # Of a slot that goes anywhere, so that a step looks ahead; to stand still looks ahead as far.
        ways = [(k, way) for k, slot in enumerate(self.model["slots"]) for way in slot["arrows"] if way != "still"]
        slot, way = ways[0] if ways else (0, "still")
        body = {"slot": slot, "arrow": way} if arrow else {"slot": 0, "code": 0}
        with self.session() as session:
            begun = session.post(f"{self.url}api/sessions", json={}, timeout=60)
            _checked(begun)
            path = f"{self.url}api/sessions/{begun.json()['session']}"

            def step(number: int) -> None:
                if number and number % 400 == 0:
                    _checked(session.post(f"{path}/reset", json={}, timeout=60))
                _checked(session.post(f"{path}/step", json=body, timeout=60))

            _until(min(seconds, _WARM_UP_SECONDS), step)
            _checked(session.post(f"{path}/reset", json={}, timeout=60))
            taken = _until(seconds, step)
            _checked(session.delete(path, timeout=60))
        return taken / seconds


def _measure(settings: ServeBenchSettings, server: _Server) -> dict[str, Any]:
    size = server.model["frame_size"]
    clip = np.random.default_rng(0).integers(0, 256, (settings.clip_frames, size, size, 3), dtype=np.uint8)
    sent = frames_to_text(clip)
    actions = [[[0.0] * server.model["action_dim"]] * len(server.model["slots"])]
    bodies = {"rollout": {"frames": sent[:1], "actions": actions}, "infer": {"frames": sent}}
    found: dict[str, Any] = {}
    for kind, body in bodies.items():
        found[kind] = {}
        _load(server, kind, body, 1, _WARM_UP_SECONDS)
        for clients in settings.clients:
            load = _load(server, kind, body, clients, settings.seconds)
            found[kind][f"{clients}_clients"] = _row(load, settings.seconds)
    return found


def _row(load: _Load, seconds: float) -> dict[str, float]:
    p50, p99 = np.percentile(load.seconds, [50, 99]) if load.seconds else (np.nan, np.nan)
    return {
        "requests_per_second": len(load.seconds) / seconds,
        "p50_ms": 1000 * float(p50),
        "p99_ms": 1000 * float(p99),
        "busy_share": load.busy / max(1, load.busy + len(load.seconds)),
    }


def _load(server: _Server, kind: str, body: dict[str, Any], clients: int, seconds: float) -> _Load:
    """So many clients at once, each with a connection of its own."""
    load, lock = _Load(), threading.Lock()
    failed: list[BaseException] = []

    def client() -> None:
        with server.session() as session:

            def ask(_: int) -> None:
                begun = time.perf_counter()
                answer = session.post(f"{server.url}api/{kind}", json=body, timeout=60)
                took = time.perf_counter() - begun
                if answer.status_code == 503:
                    with lock:
                        load.busy += 1
                    time.sleep(0.05)  # a client that comes again at once would only measure refusals
                    return
                _checked(answer)
                with lock:
                    load.seconds.append(took)

            try:
                _until(seconds, ask)
            except (requests.RequestException, EnvironmentFault) as error:
                failed.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return load


def _until(seconds: float, work: Callable[[int], None]) -> int:
    """How often `work` was done."""
    ends, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < ends:
        work(done)
        done += 1
    return done


def _checked(answer: requests.Response) -> None:
    if not answer.ok:
        raise EnvironmentFault(
            f"the player answers {answer.status_code}: {answer.text[:200]}", fix="See what it printed."
        )


def _subjects(settings: ServeBenchSettings, place: Path) -> tuple[str, str]:
    """Addresses of the model and the data set."""
    recipe = get_recipe(settings.recipe)
    model, data = settings.model, settings.data
    if data is None:
        data = str(place / "grid")
        world = make_world("grid", frame_size=recipe.tokenizer.frame_size, agents=3, cells=6)
        location = resolve(data)
        ingest_world(world, location.fs, location.path, episodes=24, frames=32)
    if model is None:
        torch.manual_seed(0)
        model = str(place / "model")
        save_model(Flam(recipe.tokenizer, recipe.model), Path(model), "# Untrained, for a benchmark\n")
    return model, data
