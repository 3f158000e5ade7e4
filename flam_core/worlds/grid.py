"""A vectorised grid world: up to 16 agents that each move at will, between walls, and block one another.

All episodes of a block advance together, so that one NumPy step serves hundreds of them. Frames are drawn by looking
cells up in an atlas of sprites.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flam_core.errors import SettingsError
from flam_core.worlds.base import Episode

MAX_AGENTS = 16
ACTIONS = ("stay", "up", "right", "down", "left")
_MOVES = np.array([(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)], dtype=np.int64)  # (row, column), as in ACTIONS
_FLOOR, _WALL, _FIRST_AGENT = 0, 1, 2


@dataclass(frozen=True)
class GridWorld:
    """Agents on a grid.

    An agent tries a uniformly drawn action at each step. It stays where it is if a wall, the border or another
    agent is in its way; agents move one after the other, in an order drawn anew at each step, so no two ever share a
    cell. `actions` holds what an agent tried, `positions` where it was.
    """

    agents: int = 4
    cells: int = 8
    """Cells along each side."""
    walls: int = 6
    """Wall cells, placed anew in each episode."""
    frame_size: int = 64
    """Height and width of a frame in pixels: a multiple of `cells`."""
    stay: float = 0.2
    """Probability that an agent tries to stay; the rest is shared by the four directions."""
    fps: float = 8.0
    name: str = "grid"
    licence: str = "Apache-2.0"

    def __post_init__(self) -> None:
        if not 1 <= self.agents <= MAX_AGENTS:
            raise SettingsError(f"grid: agents = {self.agents}", fix=f"Choose 1 to {MAX_AGENTS} agents.")
        if self.frame_size % self.cells or self.frame_size // self.cells < 4:
            raise SettingsError(
                f"grid: frame_size {self.frame_size} does not hold {self.cells} cells of at least 4 whole pixels",
                fix=f"Choose a multiple of {self.cells}, at least {4 * self.cells}.",
            )
        if self.walls < 0 or self.walls + 2 * self.agents > self.cells**2:
            raise SettingsError(
                f"grid: {self.walls} walls and {self.agents} agents leave no room on {self.cells}x{self.cells} cells",
                fix="Take fewer walls or agents, or more cells.",
            )
        if not 0.0 <= self.stay <= 1.0:
            raise SettingsError(f"grid: stay = {self.stay}", fix="It is a probability: choose 0 to 1.")

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        """Yield `count` episodes of exactly `frames` frames."""
        atlas = sprites(self.agents, self.frame_size // self.cells)
        block = max(1, min(count, 64))
        for start in range(0, count, block):
            size = min(block, count - start)
            rng = np.random.default_rng((seed, start))
            cells, actions, positions = self._simulate(size, frames, rng)
            for e in range(size):
                yield Episode(self._draw(atlas, cells[e]), actions[e], positions[e])

    def _simulate(
        self, episodes: int, frames: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cell maps uint8 [E, T, cells, cells], actions [E, T, N, 1] and positions [E, T, N, 2]."""
        n, side = self.agents, self.cells
        board = np.zeros((episodes, side * side), dtype=np.uint8)
        places = np.argsort(rng.random((episodes, side * side)), axis=1)[:, : n + self.walls]
        rows = np.arange(episodes)
        np.put_along_axis(board, places[:, n:], _WALL, axis=1)
        at = np.stack(np.divmod(places[:, :n], side), axis=-1)  # [E, N, 2]: row, column
        for i in range(n):
            board[rows, places[:, i]] = _FIRST_AGENT + i
        chances = np.array([self.stay] + [(1 - self.stay) / 4] * 4)
        actions = rng.choice(5, size=(frames, episodes, n), p=chances)
        order = np.argsort(rng.random((frames, episodes, n)), axis=-1)
        boards = np.empty((frames, episodes, side * side), dtype=np.uint8)
        tracks = np.empty((frames, episodes, n, 2), dtype=np.int64)
        for t in range(frames):
            boards[t], tracks[t] = board, at
            for turn in range(n):
                agent = order[t, :, turn]
                here = at[rows, agent]
                there = here + _MOVES[actions[t, rows, agent]]
                inside = ((there >= 0) & (there < side)).all(axis=-1)
                there = there.clip(0, side - 1)
                target = there[:, 0] * side + there[:, 1]
                free = inside & (board[rows, target] == _FLOOR)
                moved = rows[free]
                board[moved, here[free, 0] * side + here[free, 1]] = _FLOOR
                board[moved, target[free]] = _FIRST_AGENT + agent[free]
                at[moved, agent[free]] = there[free]
        positions = (tracks[..., ::-1] + 0.5) / side
        return (
            boards.reshape(frames, episodes, side, side).swapaxes(0, 1),
            actions.swapaxes(0, 1)[..., None].astype(np.float32),
            positions.swapaxes(0, 1).astype(np.float32),
        )

    def _draw(self, atlas: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Frames uint8 [T, H, W, 3] from cell maps [T, cells, cells]: whole sprite rows are copied at a time."""
        side, pixels = self.cells, atlas.shape[1]
        frames = np.empty((len(cells), side, pixels, side, pixels * 3), dtype=np.uint8)
        for y in range(pixels):  # one strip of every sprite at a time keeps both sides of the copy contiguous
            frames[:, :, y] = atlas[:, y][cells]
        return frames.reshape(len(cells), self.frame_size, self.frame_size, 3)


def sprites(agents: int, pixels: int) -> np.ndarray:
    """The atlas uint8 [2 + agents, pixels, pixels * 3]: floor, wall, then one sprite an agent.

    Agents differ in hue and in shape (disc, square, triangle, diamond), drawn with 8-fold supersampling.
    """
    fine = (np.arange(pixels * 8) + 0.5) / (pixels * 4) - 1.0
    y, x = np.meshgrid(fine, fine, indexing="ij")
    shapes = (
        x**2 + y**2 <= 0.72,
        np.maximum(abs(x), abs(y)) <= 0.72,
        (y <= 0.9) & (y >= 1.95 * abs(x) - 0.95),
        abs(x) + abs(y) <= 0.95,
    )
    floor, wall = np.array((26, 28, 36.0)), np.array((120, 120, 128.0))
    atlas = np.empty((_FIRST_AGENT + agents, pixels, pixels, 3))
    atlas[_FLOOR], atlas[_WALL] = floor, wall
    atlas[_WALL, :, -1] *= 0.7
    atlas[_WALL, -1] *= 0.7
    for i in range(agents):
        colour = np.array(colorsys.hsv_to_rgb(i / agents, 0.85 if i % 2 == 0 else 0.6, 1.0)) * 255
        shape = shapes[i % len(shapes)].reshape(pixels, 8, pixels, 8).mean(axis=(1, 3))[..., None]
        atlas[_FIRST_AGENT + i] = shape * colour + (1 - shape) * floor
    return atlas.round().astype(np.uint8).reshape(len(atlas), pixels, pixels * 3)
