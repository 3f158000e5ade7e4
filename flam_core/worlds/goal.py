"""A grid world with a task: the player is to reach a goal cell, again and again, while others wander and block.

It is played one game at a time, by a policy or by the scripted expert; the expert's games are its episodes.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flam_core.errors import SettingsError
from flam_core.worlds.base import Episode
from flam_core.worlds.grid import ACTIONS, sprites

POLICIES = ("expert", "random")
_STAY = ACTIONS.index("stay")
_MOVES = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))  # (row, column), as in ACTIONS
_FLOOR, _WALL, _PLAYER = 0, 1, 2
_STAYS = 0.2
"""Probability that one of the others tries to stay."""
_HELD_OUT = 5
"""One wall layout in so many is kept for unseen levels."""
_TRIES = 10_000
_MOST_WALLS = 0.3
"""Share of the cells: with more, layouts whose floor hangs together are too rare to draw."""


@dataclass(frozen=True)
class GoalWorld:
    """A player, others that move at random as in the world `grid`, and a goal.

    All try their action at each step, one after the other in an order drawn anew, and stay where a wall, the border or
    another is in the way. None but the player may enter the goal cell, so it is always in view. A player that gets
    there earns 1, and the goal moves to a free cell at random. The floor hangs together: every goal can be reached.

    Entity 0 is the player, then come the others, last the goal, whose actions are NaN. A level is a wall layout; one
    layout in five never occurs in `episodes` and is for `play(..., held_out=True)`.
    """

    others: int = 2
    """Agents beside the player."""
    cells: int = 8
    """Cells along each side."""
    walls: int = 6
    """Wall cells, placed anew in each episode."""
    frame_size: int = 64
    """Height and width of a frame in pixels: a multiple of `cells`."""
    policy: str = "expert"
    """Of the player in `episodes`: expert (a shortest path around whoever stands in the way) or random."""
    noise: float = 0.1
    """Probability that the expert tries an action drawn at random instead, so that its data show the way back."""
    fps: float = 8.0
    name: str = "goal"
    licence: str = "Apache-2.0"

    def __post_init__(self) -> None:
        room = self.cells**2
        if not 0 <= self.others <= 15:
            raise SettingsError(f"goal: others = {self.others}", fix="Choose 0 to 15.")
        if self.cells < 1 or self.frame_size % self.cells or self.frame_size // self.cells < 4:
            raise SettingsError(
                f"goal: frame_size {self.frame_size} does not hold {self.cells} cells of at least 4 whole pixels",
                fix=f"Choose a multiple of {self.cells}, at least {4 * self.cells}.",
            )
        if not 1 <= self.walls <= _MOST_WALLS * room or self.walls + 2 * self.entities > room:
            raise SettingsError(
                f"goal: {self.walls} walls and {self.others} others on {self.cells}x{self.cells} cells",
                fix=f"Choose 1 to {int(_MOST_WALLS * room)} walls and leave as many cells again free as entities take.",
            )
        if self.policy not in POLICIES:
            raise SettingsError(f"goal: policy = {self.policy!r}", fix=f"Choose one of {', '.join(POLICIES)}.")
        if not 0.0 <= self.noise <= 1.0:
            raise SettingsError(f"goal: noise = {self.noise}", fix="It is a probability: choose 0 to 1.")

    @property
    def entities(self) -> int:
        """Player, others and goal."""
        return self.others + 2

    @property
    def choices(self) -> int:
        """Actions of the player: 0 to choices - 1, as in `grid.ACTIONS`."""
        return len(ACTIONS)

    def play(self, seed: tuple[int, ...], *, held_out: bool = False) -> GoalGame:
        """A game at its first frame. Equal seeds and equal actions give equal games."""
        return GoalGame(self, seed, held_out)

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        """Yield `count` episodes of exactly `frames` frames. Episode e depends on (seed, e) only."""
        for e in range(count):
            game = self.play((seed, e))
            chance = np.random.default_rng((seed, e, 2))
            pictures = np.empty((frames, self.frame_size, self.frame_size, 3), dtype=np.uint8)
            actions = np.full((frames, self.entities, 1), np.nan, dtype=np.float32)
            positions = np.empty((frames, self.entities, 2), dtype=np.float32)
            rewards = np.zeros(frames, dtype=np.float32)
            for t in range(frames):
                pictures[t], positions[t] = game.frame(), game.positions()
                drawn = self.policy == "random" or chance.random() < self.noise
                rewards[t], _ = game.act(int(chance.integers(self.choices)) if drawn else game.expert())
                actions[t, :-1, 0] = game.tried
            yield Episode(pictures, actions, positions, rewards)


class GoalGame:
    """One game; it has no end of its own. Cells are numbered row by row."""

    def __init__(self, world: GoalWorld, seed: tuple[int, ...], held_out: bool) -> None:
        self.world = world
        self._rng = np.random.default_rng((*seed, 0, int(held_out)))
        self._expert_rng = np.random.default_rng((*seed, 1, int(held_out)))  # asking the expert changes nothing
        side = world.cells
        self._next = _steps(side)
        self.walls = _layout(world, self._next, self._rng, held_out)
        """Wall cells, in order."""
        floor = np.setdiff1d(np.arange(side**2), self.walls)
        *places, goal = self._rng.permutation(floor)[: world.entities].tolist()
        self.at: list[int] = places
        """Cell of the player and of each other."""
        self.goal: int = goal
        self.tried = np.zeros(world.others + 1, dtype=np.float32)
        """What each tried in the last step."""
        self._who = np.full(side**2, _FLOOR, dtype=np.int64)  # sprite of each cell, without the goal's
        self._who[list(self.walls)] = _WALL
        self._who[places] = np.arange(len(places)) + _PLAYER
        self._atlas = _atlas(world)

    def frame(self) -> np.ndarray:
        """What is seen now, uint8 [H, W, 3]."""
        side, pixels = self.world.cells, self.world.frame_size // self.world.cells
        shown = self._who.copy()
        shown[self.goal] = len(self._atlas) - 1
        tiles = self._atlas[shown].reshape(side, side, pixels, pixels, 3)
        return tiles.swapaxes(1, 2).reshape(self.world.frame_size, self.world.frame_size, 3)

    def positions(self) -> np.ndarray:
        """Centres float32 [entities, 2] as shares of the frame."""
        rows, columns = np.divmod(np.array([*self.at, self.goal]), self.world.cells)
        return ((np.stack([columns, rows], axis=-1) + 0.5) / self.world.cells).astype(np.float32)

    def act(self, action: int) -> tuple[float, bool]:
        """The player tries an action (as in `grid.ACTIONS`); what it earned, and False: the game goes on."""
        chances = [_STAYS] + [(1 - _STAYS) / 4] * 4
        others = self._rng.choice(len(ACTIONS), size=self.world.others, p=chances)
        self.tried[:] = [action, *others]
        for agent in self._rng.permutation(len(self.at)):
            here = self.at[agent]
            there = self._next[here][int(self.tried[agent])]
            if self._who[there] == _FLOOR and (agent == 0 or there != self.goal):
                self._who[here], self._who[there] = _FLOOR, agent + _PLAYER
                self.at[agent] = there
        if self.at[0] != self.goal:
            return 0.0, False
        self.goal = int(self._rng.choice(np.flatnonzero(self._who == _FLOOR)))
        return 1.0, False

    def expert(self) -> int:
        """A step of a shortest path to the goal, drawn from all there are; around the others where that is possible."""
        blocked = {*self.walls, *self.at[1:]}
        far = _distances(self.goal, self._next, blocked)
        here = self.at[0]
        if here not in far:
            far = _distances(self.goal, self._next, set(self.walls))
        steps = [a for a in range(len(ACTIONS)) if far.get(self._next[here][a], len(self._who)) == far[here] - 1]
        return int(self._expert_rng.choice(steps))

    def close(self) -> None:
        """Nothing to give back."""


def _steps(side: int) -> list[list[int]]:
    """Of each cell, where each action leads; the border keeps it where it is."""
    found = []
    for cell in range(side**2):
        row, column = divmod(cell, side)
        inside = [(row + y, column + x) for y, x in _MOVES]
        found.append([r * side + c if 0 <= r < side and 0 <= c < side else cell for r, c in inside])
    return found


def _distances(goal: int, steps: list[list[int]], blocked: set[int]) -> dict[int, int]:
    """Steps to the goal from each cell from which it can be reached (breadth first)."""
    far, waiting = {goal: 0}, deque([goal])
    while waiting:
        cell = waiting.popleft()
        for following in steps[cell]:
            if following not in far and following not in blocked:
                far[following] = far[cell] + 1
                waiting.append(following)
    return far


def _layout(world: GoalWorld, steps: list[list[int]], rng: np.random.Generator, held_out: bool) -> tuple[int, ...]:
    """Wall cells whose floor hangs together, of those layouts that are asked for."""
    for _ in range(_TRIES):
        walls = np.sort(rng.permutation(world.cells**2)[: world.walls])
        if is_held_out(walls) != held_out:
            continue
        free = next(cell for cell in range(world.cells**2) if cell not in walls)
        if len(_distances(free, steps, set(walls.tolist()))) == world.cells**2 - world.walls:
            return tuple(walls.tolist())
    raise SettingsError(
        f"goal: no layout of {world.walls} walls on {world.cells}x{world.cells} cells leaves the floor in one piece",
        fix="Take another number of walls, or more cells.",
    )


def is_held_out(walls: np.ndarray) -> bool:
    """Whether a layout (wall cells, in order) is one of those that `episodes` never shows."""
    return zlib.crc32(walls.astype("<i4").tobytes()) % _HELD_OUT == 0


def _atlas(world: GoalWorld) -> np.ndarray:
    """The sprites of `grid.sprites` and, last, the goal's: uint8 [3 + agents, pixels, pixels, 3]."""
    pixels = world.frame_size // world.cells
    known = sprites(world.others + 1, pixels).reshape(-1, pixels, pixels, 3)
    fine = abs((np.arange(pixels * 8) + 0.5) / (pixels * 4) - 1.0)
    far = np.maximum(*np.meshgrid(fine, fine))
    ring = ((far > 0.4) & (far <= 0.85)).reshape(pixels, 8, pixels, 8).mean(axis=(1, 3))[..., None]
    goal = ring * 245 + (1 - ring) * known[_FLOOR]
    return np.concatenate([known, goal.round().astype(np.uint8)[None]])
