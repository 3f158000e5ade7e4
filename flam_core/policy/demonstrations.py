"""What an expert was seen to do: the frames of its clips in a row, and the player's true actions beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flam_core.errors import DataError
from flam_core.evaluation.context import HeldOutClip

PLAYER = 0
"""Entity whose actions are learnt, in all worlds that can be played."""


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """N frames of clips, one after the other, with M transitions between frames of one clip.

    frames: uint8 [N, H, W, 3]. starts: int64 [N], of each frame the number of its clip's first. transitions: int64 [M],
    numbers of the frames that have another after them. actions: int64 [M], what the player did there.
    """

    frames: np.ndarray
    starts: np.ndarray
    transitions: np.ndarray
    actions: np.ndarray

    @staticmethod
    def of(clips: Iterable[HeldOutClip], choices: int) -> Demonstrations:
        """From whole clips with true actions.

        Raises DataError for a clip without the player's actions, or with others than 0 to choices - 1.
        """
        frames, starts, transitions, actions, at = [], [], [], [], 0
        for clip in clips:
            length = len(clip.frames)
            told = None if clip.actions is None else clip.actions[:-1, PLAYER, 0]
            if told is None or not np.isin(told, np.arange(choices)).all():
                raise DataError(
                    f"clip {clip.id}: the player (entity {PLAYER}) has actions that are unknown or above {choices - 1}",
                    fix="Use an expert data set of a world that can be played (docs/policy.md).",
                )
            frames.append(clip.frames)
            starts.append(np.full(length, at))
            transitions.append(np.arange(at, at + length - 1))
            actions.append(told.astype(np.int64))
            at += length
        if not frames:
            raise DataError("no clips to learn from", fix="Is the data set's split empty?")
        return Demonstrations(*(np.concatenate(part) for part in (frames, starts, transitions, actions)))

    @property
    def clips(self) -> list[np.ndarray]:
        """The frames of each clip, uint8 [T, H, W, 3]."""
        return np.split(self.frames, np.unique(self.starts)[1:])

    def stacked(self, chosen: np.ndarray, stack: int) -> np.ndarray:
        """Frames uint8 [n, stack, H, W, 3] up to the start of each chosen transition int64 [n], the newest last.

        Before a clip begins its first frame stands in.
        """
        ends = self.transitions[chosen]
        numbers = ends[:, None] - np.arange(stack)[::-1]
        return self.frames[np.maximum(numbers, self.starts[ends][:, None])]
