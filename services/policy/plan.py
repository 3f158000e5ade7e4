"""What the policy protocol compares: its cells, each a way to get a policy, with its world, labels and seed."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import flam_core
from flam_core.config import Config
from flam_core.config_json import canonical_json, given_values
from flam_core.errors import SettingsError
from flam_core.learning.cost import step_seconds
from flam_core.policy import Demonstrations, PolicyConfig, clone
from flam_core.policy.decoder import LEAST_LABELS
from flam_core.recipes import get_recipe
from flam_core.saved_model import weights_to_bytes
from flam_core.worlds import PlayableWorld, make_playable
from services.console import table
from services.study.tasks import Results

ENVS = {"grid": "goal", "bigfish": "bigfish", "starpilot": "starpilot"}
"""As in the table, and the world of each."""
METHODS = ("flam", "bc", "bc-all", "expert", "random")
"""flam: cloned from pseudo-labels. bc: from the labels alone. bc-all: from all true actions. expert and random play
without learning."""
LABELLED = ("flam", "bc")
"""Those that depend on the number of labels."""
CLONED = ("flam", "bc", "bc-all")
_ONE_OR_MORE = ("seeds", "games", "tasks", "threads", "episodes", "factors", "tokenizer_steps", "steps", "play_steps")
_LEAST = {**dict.fromkeys(_ONE_OR_MORE, 1), "frames": 2, "window": 0}
"""What settings must at least be, if they are given."""
_CELL_PIXELS = 8
_TRAIN_SHARE = 0.8
_TIMED_STEPS = 5


@dataclass(frozen=True)
class PolicySettings:
    """What is compared, and the sizes of it all."""

    envs: tuple[str, ...] = ("grid",)
    """Where: grid (reach the goal), bigfish, starpilot (both need `make worlds`)."""
    labels: tuple[int, ...] = (1_000, 10_000)
    """Transitions whose true action is known, for flam and bc."""
    methods: tuple[str, ...] = ()
    """Only these of flam, bc, bc-all, expert, random; none: all."""
    seeds: int = 3
    """Of everything but the data: FLAM, which labels are known, decoder, policy, games."""
    model: str | None = None
    """Infer latent actions with this model (a folder, a run, models:/NAME@ALIAS), instead of training one a seed."""
    tracking: str | None = None
    """MLflow's address, for models:/...; default MLFLOW_TRACKING_URI, else an SQLite file beside the outputs."""
    recipe: str | None = None
    """Of the FLAM that is trained; the frame size follows the world. None: tiny on grid, procgen elsewhere."""
    factors: int | None = None
    """K; None: one more than there are entities on grid, the recipe's elsewhere."""
    tokenizer_steps: int | None = None
    """Steps of stage 1; None: the recipe's."""
    steps: int | None = None
    """Steps of stage 2; None: the recipe's."""
    cells: int = 6
    """Grid: cells along each side, of 8 pixels."""
    walls: int = 5
    """Grid: wall cells."""
    others: int = 2
    """Grid: agents beside the player."""
    episodes: int | None = None
    """Expert episodes, of which 80 % are learnt from; None: 800 on grid, 200 elsewhere."""
    frames: int | None = None
    """Of an episode, at most; None: 64 on grid, 512 elsewhere."""
    games: int = 100
    """Played by each policy, on levels that the data do not show."""
    play_steps: int | None = None
    """Of a game, at most; None: 64 on grid, 1000 elsewhere."""
    window: int | None = None
    """Transitions before and after one whose latent actions the decoder is given too; None: 0 on grid, 2 elsewhere,
    where things have momentum, so that how one moves follows from actions of the past as well."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    folder: str = "outputs/policy"
    """Data, models and the result of each cell: what is there already is not done again."""
    out: str = "docs/results"
    """Where the table and the plot go, and the result of each cell that they are made of."""
    tasks: int = 2
    """Trainings at a time."""
    threads: int = 1
    """PyTorch threads of each, and CPUs that it takes of Ray."""
    gpus: float = 0.0
    """GPUs of each training; a fraction lets several share one."""
    address: str | None = None
    """Ray cluster, whose nodes must all see `folder`; default RAY_ADDRESS, else a local Ray."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{name} = {value}", fix=f"It must be at least {least}.")
        if not 0 <= self.gpus <= 1:
            raise SettingsError(f"gpus = {self.gpus:g}", fix="A training takes 0 to 1.")
        for name, known in (("envs", tuple(ENVS)), ("methods", METHODS)):
            if odd := [one for one in getattr(self, name) if one not in known]:
                raise SettingsError(f"--{name} {' '.join(odd)}", fix=f"Choose of {', '.join(known)}.")
        for name in ("envs", "methods", "labels"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise SettingsError(f"--{name} {' '.join(map(str, given))}", fix="Name each once.")
        if not self.envs:
            raise SettingsError("no environment to play in", fix=f"Give --envs {' '.join(ENVS)}, or some of them.")
        if not self.labels or min(self.labels) < LEAST_LABELS:
            raise SettingsError(f"labels = {self.labels}", fix=f"Give numbers of at least {LEAST_LABELS}.")
        for env in self.envs:
            most = int(_TRAIN_SHARE * self.episodes_of(env) * (self.frames_of(env) - 1))
            if max(self.labels) > most:
                raise SettingsError(
                    f"{max(self.labels)} labels, but {env} has at most {most} transitions to learn from",
                    fix="Record more episodes (--episodes, --frames) or ask for fewer labels.",
                )

    def episodes_of(self, env: str) -> int:
        """Expert episodes of an environment."""
        return self.episodes or (800 if env == "grid" else 200)

    def frames_of(self, env: str) -> int:
        """Frames of each."""
        return self.frames or (64 if env == "grid" else 512)

    def window_of(self, env: str) -> int:
        """Neighbouring transitions on each side that the decoder is given."""
        return (0 if env == "grid" else 2) if self.window is None else self.window

    def play_steps_of(self, env: str) -> int:
        """Steps of a game."""
        return self.play_steps or (64 if env == "grid" else 1000)


class Cell(NamedTuple):
    """One policy, or one who plays without."""

    env: str
    method: str
    labels: int | None
    seed: int
    digest: str
    """Of everything that its result follows from."""

    @property
    def name(self) -> str:
        """Of the file with its result."""
        labels = "" if self.labels is None else f"-labels{self.labels}"
        return f"policy-{self.env}-{self.method}{labels}-seed{self.seed}-{self.digest[:8]}"


def policy_cells(settings: PolicySettings) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished run already compares something.

    Raises SettingsError for sizes that do not fit, EnvironmentFault if a simulator is missing, DataError if there is
    no such model.
    """
    model = None if settings.model is None else _model_digest(settings)
    cells = []
    for seed in range(settings.seeds):
        for env in settings.envs:
            world_of(settings, env)
            for method in settings.methods or METHODS:
                known: list[Any] = [world_options(settings, env), settings.games, settings.play_steps_of(env)]
                if method in CLONED:
                    known += [settings.episodes_of(env), settings.frames_of(env), given_values(settings.policy)]
                if method == "flam":
                    known.append(model or given_values(flam_config(settings, env, seed)))
                    known += [settings.window_of(env)] if settings.window_of(env) else []
                digest = hashlib.sha256(canonical_json(known).encode()).hexdigest()
                for labels in settings.labels if method in LABELLED else (None,):
                    cells.append(Cell(env, method, labels, seed, digest))
    return cells


def world_options(settings: PolicySettings, env: str) -> dict[str, Any]:
    """Of the world of an environment."""
    if env == "grid":
        cells = settings.cells
        return {
            "others": settings.others,
            "cells": cells,
            "walls": settings.walls,
            "frame_size": _CELL_PIXELS * cells,
            "policy": "expert",
        }
    return {"backgrounds": False, "policy": "expert"}


def world_of(settings: PolicySettings, env: str) -> PlayableWorld:
    """The world whose expert is watched, and in which policies play."""
    return make_playable(ENVS[env], **world_options(settings, env))


def data_name(settings: PolicySettings, env: str) -> str:
    """Of an environment's data set: its folder."""
    made = [world_options(settings, env), settings.episodes_of(env), settings.frames_of(env)]
    return f"{ENVS[env]}-{hashlib.sha256(canonical_json(made).encode()).hexdigest()[:8]}"


def flam_config(settings: PolicySettings, env: str, seed: int) -> Config:
    """The recipe, with factors and frame size as the world asks for. Each factor keeps the recipe's latent width."""
    recipe = get_recipe(settings.recipe or ("tiny" if env == "grid" else "procgen"))
    world = world_of(settings, env)
    factors = settings.factors or (settings.others + 3 if env == "grid" else recipe.model.factors)
    model = replace(recipe.model, factors=factors, latent_width=factors * recipe.model.action_dim)
    first = recipe.tokenizer_stage.steps if settings.tokenizer_steps is None else settings.tokenizer_steps
    second = recipe.flam_stage.steps if settings.steps is None else settings.steps
    return replace(
        recipe,
        tokenizer=replace(recipe.tokenizer, frame_size=world.frame_size),
        model=model,
        tokenizer_stage=replace(recipe.tokenizer_stage, steps=first),
        flam_stage=replace(recipe.flam_stage, steps=second),
        seed=seed,
    )


def flam_place(settings: PolicySettings, env: str, seed: int) -> Path:
    """The folder of the FLAM that is trained for an environment and a seed."""
    made = canonical_json([given_values(flam_config(settings, env, seed)), data_name(settings, env)])
    digest = hashlib.sha256(made.encode()).hexdigest()
    return Path(settings.folder).absolute() / "models" / f"{env}-seed{seed}-{digest[:8]}"


def _model_digest(settings: PolicySettings) -> str:
    """Identity of the model that is given. Raises SettingsError if it is for frames of another size."""
    assert settings.model is not None
    model = flam_core.load(settings.model)
    size = model.tokenizer.config.frame_size
    for env in settings.envs:
        if world_of(settings, env).frame_size != size:
            raise SettingsError(
                f"{settings.model} takes frames of {size}x{size}, {env} has {world_of(settings, env).frame_size}",
                fix="Give a model that was trained on data of that world, or none.",
            )
    return hashlib.sha256(weights_to_bytes(model)).hexdigest()


def show_plan(settings: PolicySettings) -> None:
    """Print what would run, what is done, and about how long the rest takes by some steps on this machine's CPU."""
    cells = policy_cells(settings)
    results = Results(Path(settings.folder).absolute(), Path(settings.out))
    rows, seconds, models = {}, 0.0, 0
    for env in settings.envs:
        mine = [cell for cell in cells if cell.env == env]
        left = [cell for cell in mine if not results.has(cell.name)]
        step = _policy_step(settings, env)
        cloned = sum(cell.method in CLONED for cell in left)
        fresh = {cell.seed for cell in left if cell.method == "flam"} if settings.model is None else set()
        config = flam_config(settings, env, 0)
        flam = sum(
            stage.steps * step_seconds(config, number, settings.threads)
            for number, stage in enumerate((config.tokenizer_stage, config.flam_stage))
            if fresh and stage.steps
        )
        seconds += cloned * settings.policy.steps * step + len(fresh) * flam
        models += len(fresh)
        world = world_of(settings, env)
        rows[env] = (
            f"{settings.episodes_of(env)} episodes of {settings.frames_of(env)} frames at {world.frame_size} px; "
            f"{len(mine)} cells, {len(mine) - len(left)} done; {len(fresh)} FLAM of K = {config.model.factors} to train"
            f"{f', {flam / 60:.0f} min each' if fresh else ''}; a policy {settings.policy.steps * step / 60:.1f} min"
        )
    rows["labels"] = ", ".join(str(one) for one in settings.labels)
    rows["seeds"] = str(settings.seeds)
    rows["games"] = f"{settings.games} by each, on unseen levels"
    rows["left"] = (
        f"about {seconds / settings.tasks / 60:.0f} min with {settings.tasks} at a time on this machine's CPU as busy "
        "as it is now, data and games not counted"
    )
    table(f"policies: {len(cells)} cells", rows)


def _policy_step(settings: PolicySettings, env: str) -> float:
    """Seconds of a step of behaviour cloning, on noise."""
    size, choices = world_of(settings, env).frame_size, world_of(settings, env).choices
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (settings.policy.batch + 1, size, size, 3), dtype=np.uint8)
    transitions = np.arange(settings.policy.batch)
    noise = Demonstrations(frames, np.zeros(len(frames), dtype=np.int64), transitions, transitions % choices)
    targets = np.full((len(transitions), choices), 1 / choices, dtype=np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        clone(noise, transitions, targets, replace(settings.policy, steps=1), 0, torch.device("cpu"))
        begun = time.perf_counter()
        clone(noise, transitions, targets, replace(settings.policy, steps=_TIMED_STEPS), 0, torch.device("cpu"))
        return (time.perf_counter() - begun) / _TIMED_STEPS
    finally:
        torch.set_num_threads(before)
