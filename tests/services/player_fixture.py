"""A player for tests: small untrained models in a registry, a data set, and `jobs/play.py` as users start it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import requests
import torch

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.data.ingest import ingest_world
from flam_core.model import Flam
from flam_core.saved_model import WEIGHTS, save_model
from flam_core.steering.directions import Examples
from flam_core.steering.discovered import DiscoveredActions, save_actions
from flam_core.worlds import make_world
from services.storage import resolve

SIZE, SLOTS = 24, 3
TOKEN = "a-token-for-the-tests"
NAME = "flam-played"
STEPS = 30
"""Of a scene, at most."""
TOKENIZER = TokenizerConfig(frame_size=SIZE, unshuffle=4, channels=(16,), feature_dim=8)
MODEL = ModelConfig(factors=SLOTS, width=24, heads=4, blocks=1, latent_width=SLOTS * 4, temporal_window=4)
MOTION = {"still": (0.0, 0.0), "up": (0.0, -0.1), "right": (0.1, 0.0), "down": (0.0, 0.1), "left": (-0.1, 0.0)}


def small_model(seed: int) -> Flam:
    """Untrained, but each weight is moved, so that every slot and action makes a difference."""
    torch.manual_seed(seed)
    model = Flam(TOKENIZER, MODEL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def some_actions(seed: int) -> DiscoveredActions:
    """Every slot has a code for each direction, and one to stand still."""
    generator = torch.Generator().manual_seed(seed)
    vectors = tuple(2 * torch.randn(len(MOTION), MODEL.action_dim, generator=generator) for _ in range(SLOTS))
    usage = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1])
    motion, alike = torch.tensor(list(MOTION.values())), torch.ones(len(MOTION))
    # What each slot did at two places: the same codes, so that an arrow has two candidates.
    places = torch.tensor([[0.25, 0.25], [0.75, 0.75]]).repeat_interleave(len(MOTION), dim=0)
    seen = tuple(Examples(places, motion.repeat(2, 1), torch.cat([v, v + 0.5])) for v in vectors)
    return DiscoveredActions(vectors, (usage,) * SLOTS, (motion,) * SLOTS, (0, None, 1), (alike,) * SLOTS, seen)


def save_small_model(folder: Path, seed: int) -> Path:
    """With its actions beside it."""
    save_model(small_model(seed), folder, "# A small model\n")
    save_actions(some_actions(seed), folder)
    return folder


@dataclass(frozen=True)
class Played:
    """A player that is up."""

    url: str
    tracking: str
    data: Path
    models: tuple[Path, Path, Path]
    """Versions 1 and 2 of NAME, of which 1 is champion at first, and the challenger."""

    def ask(self, method: str, path: str, token: str | None = TOKEN, **given: object) -> requests.Response:
        """A request with the token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        given["headers"] = {**headers, **given.pop("headers", {})}  # type: ignore[dict-item]
        return requests.request(
            method, f"{self.url}{path}", timeout=120, proxies={"http": ""}, allow_redirects=False, **given
        )

    def champion(self, version: str) -> None:
        """Move the alias."""
        mlflow.MlflowClient(self.tracking).set_registered_model_alias(NAME, "champion", version)


@contextmanager
def played(place: Path) -> Iterator[Played]:
    """All of it, started once for all tests."""
    from tests.services.conftest import free_ports  # which imports this module

    data = small_grid(place / "grid")
    first, second, third = (save_small_model(place / name, seed) for seed, name in enumerate(("one", "two", "three")))
    tracking = f"sqlite:///{place / 'mlflow.db'}"
    for folder in (first, second):
        _register(tracking, folder, place / "artifacts" / folder.name)
    (port,) = free_ports(1)
    made = Played(f"http://127.0.0.1:{port}/", tracking, data, (first, second, third))
    made.champion("1")
    options = {"--data": data, "--tracking": tracking, "--port": port, "--poll_seconds": 1, "--limits.sessions": 4}
    options |= {"--limits.clip_frames": 16, "--limits.body_mb": 1, "--limits.queue": 6, "--scenes": 3}
    options |= {"--challenger": third, "--limits.steps": STEPS}
    with started(place, f"models:/{NAME}@champion", options, FLAM_PLAYER_TOKEN=TOKEN) as link:
        assert link == f"{made.url}?token={TOKEN}"
        yield made


@contextmanager
def started(place: Path, model: Path | str, options: Mapping[str, object], **variables: str) -> Iterator[str]:
    """`jobs/play.py`, started in a folder, until the end of the block. Gives the address that it prints when it is up.

    variables: of its environment.
    """
    from tests.services.conftest import REPOSITORY, environment, kill_group  # which imports this module

    command = [sys.executable, str(REPOSITORY / "jobs/play.py"), str(model)]
    command += [str(word) for option in options.items() for word in option]
    log = place / "log"
    env = environment(OMP_NUM_THREADS="1", **variables)
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=place, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield _link(process, log)
    finally:
        kill_group(process)


def small_grid(folder: Path) -> Path:
    """A data set of the models' size."""
    location = resolve(str(folder))
    world = make_world("grid", frame_size=SIZE, agents=2, cells=4)
    ingest_world(world, location.fs, location.path, episodes=30, frames=16)
    return folder


def _link(process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> str:
    deadline = time.monotonic() + seconds
    while not (found := re.search(r"^open (\S+)  \(Ctrl-C ends it\)$", log.read_text(), re.MULTILINE)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the player did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.3)
    return found[1]


def _register(tracking: str, folder: Path, artifacts: Path) -> None:
    """A version of NAME, as `services.registry.register` leaves one, without what MLflow's pyfunc adds."""
    client = mlflow.MlflowClient(tracking)
    experiment = client.get_experiment_by_name("played")
    number = experiment.experiment_id if experiment else client.create_experiment("played", artifacts.as_uri())
    run = client.create_run(number).info
    shutil.copytree(folder, artifacts / "model")
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    tags = {"weights_sha256": sha256}
    client.create_model_version(NAME, (artifacts / "model").as_uri(), run_id=run.run_id, tags=tags)
