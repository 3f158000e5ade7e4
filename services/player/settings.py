"""What the player takes, and its limits. Nothing here imports torch: the program that starts the server needs none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import tyro

from flam_core.errors import SettingsError

Others = Literal["video", "prior", "still"]
"""What slots do that nobody steers: as inferred from the clip the scene came from, drawn from the learned prior, or
nothing."""
Feedback = Literal["frames", "slots"]
"""As in `flam_core.steering.Scene`."""


@dataclass(frozen=True)
class Limits:
    """How much one server takes on. What goes beyond is refused with a clear answer, and nothing else suffers."""

    sessions: int = 16
    """Scenes that are played at the same time."""
    idle_seconds: float = 900.0
    """After so long without a request a session ends."""
    full_seconds: float = 60.0
    """After so long one ends whose place another needs, when all are taken."""
    undo: int = 200
    """Steps that can be taken back."""
    undo_mb: float = 32.0
    """Of a session, for taking back: large models have fewer steps to take back."""
    steps: int = 500
    """Of a session from one start. `jobs/generate.py` replays as many."""
    clip_frames: int = 128
    """Of a clip that is sent or asked for."""
    body_mb: float = 16.0
    """Of a request."""
    batch: int = 8
    """Requests to the API that go through the model together."""
    queue: int = 32
    """Requests to each deployment that wait or are worked on; the next is told to come again."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise SettingsError(f"limits.{name} = {value}", fix="It must be a number above 0.")


@dataclass(frozen=True)
class PlayerSettings:
    """What is served."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS (followed when the alias moves), models:/NAME/VERSION, or the folder of a model or a run."""
    challenger: str | None = None
    """A second model, played beside the first from the same start with the same keys."""
    data: str | None = None
    """The data set whose held-out clips scenes start from; default: the one that the model was trained on."""
    tracking: str | None = None
    """MLflow's address; default MLFLOW_TRACKING_URI, else an SQLite file beside the outputs."""
    scenes: int = 24
    """Held-out clips to start from."""
    clip_frames: int = 64
    """Of each: so long the other slots can follow the video."""
    feedback: Feedback = "frames"
    """What a step builds on: the frame that was drawn, which holds far better, or the predicted slots."""
    poll_seconds: float = 10.0
    """How often the registry is asked whether an alias has moved."""
    seed: int = 0
    """Of what the prior draws, until the page gives another."""
    threads: int = 1
    """Of PyTorch, in each process. More than one seldom helps models this small."""
    replicas: int = 1
    """Processes that answer the API. Scenes are played in one of its own."""
    gpus: float = 0.0
    """Of each process, as Ray counts them."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("scenes", "threads", "replicas"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}", fix="It must be 1 or more.")
        if not 0 <= self.seed < 2**53:  # as the page and `wire.Seed` take it
            raise SettingsError(f"seed = {self.seed}", fix="Choose 0 to 9007199254740991.")
        if self.clip_frames < 2:
            raise SettingsError(f"clip_frames = {self.clip_frames}", fix="A clip to start from has 2 frames or more.")
        if not self.poll_seconds > 0:
            raise SettingsError(f"poll_seconds = {self.poll_seconds}", fix="It must be above 0.")
        if not 0 <= self.gpus <= 1:
            raise SettingsError(f"gpus = {self.gpus}", fix="A process uses one device: choose 0 to 1.")


@dataclass(frozen=True)
class Binding:
    """Where it is served, and to whom."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: this machine alone; 0.0.0.0: everybody who can reach it."""
    port: int = 8000
    token: str | None = None
    """That requests must carry; better in FLAM_PLAYER_TOKEN, since others see command lines. Default: none on a
    loopback address of a Ray of its own, else one that is made and printed."""
    no_token: bool = False
    """Ask for none, though others can reach the server: where a proxy before it asks who they are."""
    allow_host: tuple[str, ...] = ()
    """Names that a server without a token may be asked by, besides the loopback ones."""
    address: str | None = None
    """Ray cluster to deploy on; default RAY_ADDRESS, else a Ray of its own."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise SettingsError(f"port {self.port}", fix="Choose 1 to 65535.")
        if self.no_token and self.token:
            raise SettingsError("--no_token and --token are both given", fix="Give one of them.")
