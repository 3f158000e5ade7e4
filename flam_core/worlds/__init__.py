"""Built-in worlds: simulators that record episodes with ground truth. `grid` and `goal` need no package beyond NumPy.

>>> world = make_world("grid", agents=2, cells=4, walls=0, frame_size=32)
>>> next(world.episodes(count=1, frames=5, seed=0)).frames.shape
(5, 32, 32, 3)
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, cast

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.worlds.base import Episode, Game, PlayableWorld, World
from flam_core.worlds.driving import DrivingWorld
from flam_core.worlds.goal import GoalWorld
from flam_core.worlds.grid import GridWorld
from flam_core.worlds.multigrid import MultiGridWorld
from flam_core.worlds.procgen import INSTALL, ProcgenWorld

__all__ = ["WORLDS", "Episode", "Game", "PlayableWorld", "World", "make_playable", "make_world"]

WORLDS = ("grid", "goal", "multigrid", "bigfish", "leaper", "starpilot", "driving")
PLAYABLE = ("goal", "bigfish", "starpilot")
_NOT_OPTIONS = ("name", "licence", "game")  # what the name of the world already says


def make_world(name: str, **options: Any) -> World:
    """The world called `name`; `options` are fields of its dataclass. Raises before any simulator starts."""
    kind: type[Any]
    if name == "grid":
        kind, package, fixed = GridWorld, "numpy", {}
    elif name == "goal":
        kind, package, fixed = GoalWorld, "numpy", {}
    elif name == "multigrid":
        kind, package, fixed = MultiGridWorld, "multigrid", {}
    elif name == "driving":
        kind, package, fixed = DrivingWorld, "highway_env", {}
    elif name in WORLDS:
        kind, package, fixed = ProcgenWorld, "procgen", {"game": name}
    else:
        raise SettingsError(
            f"worlds: there is no world {name!r}", fix=_suggest(name, WORLDS) + f"Choose one of {', '.join(WORLDS)}."
        )
    known = [f.name for f in fields(kind) if f.name not in _NOT_OPTIONS]
    for option in options:
        if option not in known:
            raise SettingsError(
                f"{name}: there is no option {option!r}",
                fix=_suggest(option, known) + f"The options are {', '.join(known)}.",
            )
    defaults = {f.name: f.default for f in fields(kind)}
    for option, value in options.items():
        wanted = type(defaults[option])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise SettingsError(f"{name}: {option} = {value!r}", fix=f"Give it a value of type {wanted.__name__}.")
    world = kind(**fixed, **options)
    if importlib.util.find_spec(package) is None:
        fix = INSTALL if kind is ProcgenWorld else "Run: pip install 'flam[worlds]'"
        raise EnvironmentFault(f"{name}: the package {package} is not installed", fix=fix)
    return world


def make_playable(name: str, **options: Any) -> PlayableWorld:
    """As `make_world`, for the worlds whose player can be taken over. Raises SettingsError for another."""
    if name in WORLDS and name not in PLAYABLE:
        raise SettingsError(f"{name}: nobody plays in this world", fix=f"Choose one of {', '.join(PLAYABLE)}.")
    return cast(PlayableWorld, make_world(name, **options))


def _suggest(word: str, known: Iterable[str]) -> str:
    """'Did you mean ...? ' if something known is like `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""
