"""A world on the `multigrid` package: agents that turn, walk and carry balls about in one walled room.

The package simulates; frames are put together here from its own rendered tiles, drawing again only the cells that
changed, because its renderer walks over every cell of every frame.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.worlds.base import Episode

MAX_AGENTS = 16
ACTIONS = ("left", "right", "forward", "pickup", "drop")
_FORWARD = ACTIONS.index("forward")


@dataclass(frozen=True)
class MultiGridWorld:
    """Agents (triangles) in a room with walls and balls, seen whole and from above.

    Policy: random with persistence. With probability `persistence` an agent walks forward, else it draws one of
    ACTIONS uniformly; so it crosses the room in straight runs and now and then moves a ball. `actions` [T, N, 1] holds
    the index in ACTIONS of what agent i tried (also when it was blocked), `positions` the centre of its cell. Agents
    act in an order drawn anew at each step, block one another and never share a cell. A ball that is carried is not
    drawn, as in the package. No rewards.
    """

    entities: int = 4
    """Agents. The package has six colours, so agent 6 looks like agent 0."""
    cells: int = 8
    """Cells along each side, the border wall included."""
    walls: int = 3
    """Wall cells inside the room, placed anew in each episode."""
    balls: int = 3
    """Balls that agents can pick up and drop."""
    frame_size: int = 64
    """Height and width of a frame in pixels: a multiple of `cells`."""
    persistence: float = 0.6
    """Probability that an agent walks on instead of drawing an action."""
    fps: float = 8.0
    name: str = "multigrid"
    licence: str = "Apache-2.0"

    def __post_init__(self) -> None:
        if not 1 <= self.entities <= MAX_AGENTS:
            raise SettingsError(f"multigrid: entities = {self.entities}", fix=f"Choose 1 to {MAX_AGENTS} agents.")
        if self.cells < 4:
            raise SettingsError(f"multigrid: cells = {self.cells}", fix="Choose at least 4: the border is a wall.")
        if self.frame_size % self.cells or self.frame_size // self.cells < 6:
            raise SettingsError(
                f"multigrid: frame_size {self.frame_size} does not hold {self.cells} cells of at least 6 whole pixels",
                fix=f"Choose a multiple of {self.cells}, at least {6 * self.cells}.",
            )
        if min(self.walls, self.balls) < 0 or self.walls + self.balls + 2 * self.entities > (self.cells - 2) ** 2:
            raise SettingsError(
                f"multigrid: {self.walls} walls, {self.balls} balls and {self.entities} agents do not fit into a room "
                f"of {self.cells - 2}x{self.cells - 2} cells",
                fix="Take fewer of them, or more cells.",
            )
        if not 0.0 <= self.persistence <= 1.0:
            raise SettingsError(
                f"multigrid: persistence = {self.persistence}", fix="It is a probability: choose 0 to 1."
            )

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        """Yield `count` episodes of exactly `frames` frames. Episode e depends on (seed, e) only."""
        room, render_tile = self._room()
        for e in range(count):
            rng = np.random.default_rng((seed, e))
            room.reset(seed=int(rng.integers(2**31)))
            actions = self._policy(frames, rng)
            yield self._record(room, render_tile, actions)

    def _policy(self, frames: int, rng: np.random.Generator) -> np.ndarray:
        """Action indices int64 [T, N]."""
        shape = (frames, self.entities)
        drawn = rng.integers(len(ACTIONS), size=shape)
        return np.where(rng.random(shape) < self.persistence, _FORWARD, drawn)

    def _record(self, room: Any, render_tile: Callable[..., np.ndarray], actions: np.ndarray) -> Episode:
        """Play the actions [T, N] and draw each frame."""
        side, pixels = self.cells, self.frame_size // self.cells
        frames = np.empty((len(actions), self.frame_size, self.frame_size, 3), dtype=np.uint8)
        positions = np.empty((len(actions), self.entities, 2), dtype=np.float32)
        canvas = np.empty((side, pixels, side, pixels, 3), dtype=np.uint8)  # a view by cell of the frame being drawn
        shown = np.full((side, side, room.grid.state.shape[-1] + 1), -1, dtype=np.int64)
        for t, chosen in enumerate(actions):
            places, headings = np.asarray(room.agent_states.pos), np.asarray(room.agent_states.dir)
            occupant = np.full((side, side, 1), -1, dtype=np.int64)  # [x, y]: which agent stands there, and its heading
            occupant[places[:, 0], places[:, 1], 0] = 4 * np.arange(self.entities) + headings
            state = np.concatenate([room.grid.state, occupant], axis=-1)
            for x, y in np.argwhere((state != shown).any(axis=-1)):
                who = state[x, y, -1]
                agent = room.agents[who // 4] if who >= 0 else None
                canvas[y, :, x] = render_tile(room.grid.get(x, y), agent=agent, tile_size=pixels)
            shown = state
            frames[t] = canvas.reshape(frames.shape[1:])
            positions[t] = (places + 0.5) / side
            room.handle_actions(dict(enumerate(chosen.tolist())))  # step() would also work out what each agent sees
        return Episode(frames, actions[..., None].astype(np.float32), positions)

    def _room(self) -> tuple[Any, Callable[..., np.ndarray]]:
        """The package's environment with our layout, and its tile renderer."""
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it would greet on standard output
        try:
            base: Any = import_module("multigrid").MultiGridEnv
            grids = import_module("multigrid.core.grid")
            objects = import_module("multigrid.core.world_object")
            colours = list(import_module("multigrid.core.constants").Color)
        except ImportError as error:
            raise EnvironmentFault(
                f"multigrid: the simulator is not installed ({error})", fix="Run: pip install 'flam[worlds]'"
            ) from error
        walls, balls = self.walls, self.balls

        class Room(base):
            """One room. It draws from `np_random` alone: the package's own helpers ignore the seed of `reset`."""

            def _gen_grid(self, width: int, height: int) -> None:
                self.grid = grids.Grid(width, height)
                self.grid.wall_rect(0, 0, width, height)
                inside = self.np_random.permutation((width - 2) * (height - 2))
                spots = [(1 + int(i) % (width - 2), 1 + int(i) // (width - 2)) for i in inside]
                for _ in range(walls):
                    self.grid.set(*spots.pop(), objects.Wall())
                for i in range(balls):
                    self.grid.set(*spots.pop(), objects.Ball(colours[(i + 3) % len(colours)]))
                for agent in self.agents:
                    agent.state.pos = spots.pop()
                    agent.state.dir = int(self.np_random.integers(4))

            def gen_obs(self) -> dict[int, Any]:
                return {}  # nobody reads what each agent sees, and the package compiles code to work it out

        room = Room(agents=self.entities, grid_size=self.cells, allow_agent_overlap=False)
        return room, grids.Grid.render_tile
