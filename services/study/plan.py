"""What a study trains: its cells, each a config and a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flam_core.config import Config
from flam_core.config_json import canonical_json, given_values
from flam_core.errors import SettingsError
from flam_core.recipes import get_recipe
from flam_core.variants import apply_variant
from flam_core.worlds import make_world
from flam_core.worlds.grid import ACTIONS

FACTORING = (
    "flam",
    "monolithic-gaussian",
    "monolithic-vq",
    "grouped",
    "playslot",
    "slotformer",
    "true-actions",
)
"""FLAM and its rivals, as `model` in a study's table and as `--variant`."""
FRAMES = 64
"""Of an episode."""
_ABLATIONS = ("flam", "flam-vq", "no-temporal", "global-coupled", "no-motion")
"""Variants. K and beta are changed beside them."""
_ABLATED_AGENTS = 4
_FACTORS = (2, 4, 8, 16)
_BETAS = (1e-5, 1e-2, 3e-1)
"""Beside the recipe's own, which `flam` has."""
_CELLS = (6, 8)


@dataclass(frozen=True)
class StudySettings:
    """The sizes of a study."""

    recipe: str = "tiny"
    """Sizes of model and training; factors, latent width and frame size follow the world."""
    agents: tuple[int, ...] = (2, 4, 8)
    """Agents of the worlds (factoring)."""
    seeds: int = 3
    """Trainings of each model."""
    models: tuple[str, ...] = ()
    """Only these; none: all of the study."""
    cells: int | None = None
    """Cells along each side of the grid; None: 6 where the recipe's frames can be split so, else 8."""
    spare: int | None = None
    """Factors of FLAM beyond one for each agent; None: two, with multigrid none: the paper has K = 4 for four."""
    walls: int = 3
    """Wall cells."""
    episodes: int = 800
    """Episodes of each data set, of 64 frames."""
    tokenizer_steps: int | None = None
    """Steps of stage 1; None: the recipe's."""
    steps: int | None = None
    """Steps of stage 2; None: the recipe's."""
    folder: str = "outputs/studies"
    """Data, tokenizers and the result of each training: what is there already is not done again."""
    out: str = "docs/results"
    """Where the tables and plots go, and the result of each training that they are made of."""
    tasks: int = 2
    """Trainings at a time."""
    threads: int = 1
    """PyTorch threads of each."""
    gpus: float = 0.0
    """GPUs of each training; a fraction lets several share one."""
    address: str | None = None
    """Ray cluster, whose nodes must all see `folder`; default RAY_ADDRESS, else a local Ray."""

    def __post_init__(self) -> None:
        for name in ("seeds", "cells", "episodes", "tasks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} = {value}", fix="It must be at least 1.")
        if self.spare is not None and self.spare < 0:
            raise SettingsError(f"spare = {self.spare}", fix="It must not be negative.")
        if not 0 <= self.gpus <= 1:
            raise SettingsError(f"gpus = {self.gpus}", fix="A training uses one device: choose 0 to 1.")
        if not self.agents or min(self.agents) < 1 or len(set(self.agents)) < len(self.agents):
            raise SettingsError(f"agents = {self.agents}", fix="Give one or more numbers of agents, each once.")

    @property
    def spare_factors(self) -> int:
        """`spare`, or what stands for it."""
        return (0 if self.recipe == "multigrid" else 2) if self.spare is None else self.spare


class Cell(NamedTuple):
    """One training."""

    model: str
    """As in the table: a variant, or the name of an ablation."""
    agents: int
    seed: int
    config: Config
    data: str
    """`data_digest`."""

    @property
    def name(self) -> str:
        """Of the file with its result: other data or another config are another cell, a new setting at its default is
        not."""
        digest = hashlib.sha256(f"{canonical_json(given_values(self.config))}{self.data}".encode()).hexdigest()
        return f"{self.model}-agents{self.agents}-seed{self.seed}-{digest[:8]}"


def world_options(settings: StudySettings, agents: int) -> dict[str, Any]:
    """Of the grid world with so many agents."""
    size = get_recipe(settings.recipe).tokenizer.frame_size
    cells = settings.cells or next((cells for cells in _CELLS if size % cells == 0), _CELLS[0])
    return {"agents": agents, "cells": cells, "walls": settings.walls, "frame_size": size}


def data_digest(settings: StudySettings, agents: int) -> str:
    """sha256 of what the data of a world follow from."""
    made = [world_options(settings, agents), settings.episodes, FRAMES]
    return hashlib.sha256(canonical_json(made).encode()).hexdigest()


def base_config(settings: StudySettings, agents: int, seed: int) -> Config:
    """FLAM with as many factors as there are agents, and some to spare for starts that go to something else.

    Each factor has a latent action of the recipe's width, and so the total width that all rivals share.
    """
    make_world("grid", **world_options(settings, agents))  # raises SettingsError if they do not fit
    recipe = get_recipe(settings.recipe)
    factors = agents + settings.spare_factors
    model = replace(recipe.model, factors=factors, latent_width=factors * recipe.model.action_dim)
    first = replace(recipe.tokenizer_stage, steps=settings.tokenizer_steps or recipe.tokenizer_stage.steps)
    second = replace(recipe.flam_stage, steps=settings.steps or recipe.flam_stage.steps)
    return replace(recipe, model=model, tokenizer_stage=first, flam_stage=second, seed=seed)


def factoring_cells(settings: StudySettings) -> list[Cell]:
    """FLAM against its rivals as the number of agents grows.

    In an order in which an unfinished study already compares something: seed by seed, world by world.
    """
    return [
        Cell(
            model,
            agents,
            seed,
            apply_variant(base_config(settings, agents, seed), model, (agents, 1, len(ACTIONS))),
            data_digest(settings, agents),
        )
        for seed in range(settings.seeds)
        for agents in settings.agents
        for model in _chosen(settings, FACTORING)
    ]


def ablation_cells(settings: StudySettings) -> list[Cell]:
    """FLAM with one thing changed at a time, with four agents (flam-spec: the ablation table)."""
    cells = []
    for seed in range(settings.seeds):
        base = base_config(settings, _ABLATED_AGENTS, seed)
        changed = {name: apply_variant(base, name) for name in _ABLATIONS}
        for factors in _FACTORS:  # of one total width, as in the paper: each has the less for itself
            changed[f"factors-{factors}"] = replace(base, model=replace(base.model, factors=factors))
        for beta in _BETAS:
            changed[f"beta-{beta:g}"] = replace(base, loss=replace(base.loss, beta=beta))
        chosen = _chosen(settings, tuple(changed))
        data = data_digest(settings, _ABLATED_AGENTS)
        cells += [Cell(name, _ABLATED_AGENTS, seed, changed[name], data) for name in chosen]
    return cells


def _chosen(settings: StudySettings, known: tuple[str, ...]) -> tuple[str, ...]:
    if odd := [name for name in settings.models if name not in known]:
        raise SettingsError(f"the study has no model {', '.join(odd)}", fix=f"Models: {', '.join(known)}.")
    return tuple(name for name in known if not settings.models or name in settings.models)
