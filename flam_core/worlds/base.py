"""What every built-in world gives: episodes of frames with the ground truth that training never sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Episode:
    """One recorded episode.

    frames: uint8 [T, H, W, 3], RGB.
    actions: float32 [T, N, A]; `actions[t]` is what each of the N entities was told to do between frames t and t + 1
        (A = 1 and whole numbers for discrete worlds; NaN where the world does not know it).
    positions: float32 [T, N, 2]; (x, y) of each entity's centre in [0, 1] of the frame, NaN while it is not in view.
    rewards: float32 [T], or None for a world without rewards.
    """

    frames: np.ndarray
    actions: np.ndarray
    positions: np.ndarray
    rewards: np.ndarray | None = None


class World(Protocol):
    """A simulator that records episodes. Equal seeds give equal episodes, byte for byte."""

    @property
    def name(self) -> str:
        """As in `worlds.WORLDS`."""
        ...

    @property
    def licence(self) -> str:
        """Under which its frames may be used."""
        ...

    @property
    def fps(self) -> float:
        """Frames a second."""
        ...

    @property
    def frame_size(self) -> int:
        """Height and width of a frame in pixels."""
        ...

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        """Yield `count` episodes of at most `frames` frames each (a world may end an episode earlier)."""
        ...


class Game(Protocol):
    """An episode that somebody plays: `frame`, then `act`, until an act ends it."""

    def frame(self) -> np.ndarray:
        """What is seen now, uint8 [H, W, 3]."""
        ...

    def act(self, action: int) -> tuple[float, bool]:
        """What the action earned, and whether that was the end."""
        ...

    def expert(self) -> int:
        """What the scripted expert, who knows more than the picture, would do now. Asking changes nothing."""
        ...

    def close(self) -> None:
        """Give back what the simulator holds."""
        ...


class PlayableWorld(World, Protocol):
    """A world with a player that can be taken over, and rewards."""

    @property
    def choices(self) -> int:
        """Actions of the player (entity 0): 0 to choices - 1."""
        ...

    def play(self, seed: tuple[int, ...], *, held_out: bool = False) -> Game:
        """A game at its first frame. Equal seeds and equal actions give equal games; levels of `held_out` games are
        none of those that `episodes` records."""
        ...
