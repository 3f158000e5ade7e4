"""What an ingest reads: a source of recordings, each one episode cut into clips. And what most sources share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from flam_core.data.shard import Clip, Truth
from flam_core.data.videos import BadVideo, Unusable, VideoChunk, VideoOptions

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class Recording:
    """One episode, read as its clips are asked for."""

    episode: str
    """Unique in the source."""
    clips: Iterator[Clip | BadVideo]
    """All of the length asked for but the last, which may be shorter. After a BadVideo, no clip of it may be used."""


class Source(Protocol):
    """What an ingest reads. Equal sources give equal recordings in the same order."""

    @property
    def name(self) -> str:
        """What a data set made of it is called unless it is given a name."""
        ...

    @property
    def description(self) -> str:
        """What it is, in words, for the manifest. Without absolute paths."""
        ...

    @property
    def licence(self) -> str:
        """Under which the frames may be used."""
        ...

    @property
    def settings(self) -> Mapping[str, Setting]:
        """All that decides what it gives, for the manifest."""
        ...

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of every frame in pixels."""
        ...

    @property
    def episodes(self) -> int | None:
        """How many recordings there will be; None if that shows only on reading."""
        ...

    @property
    def frames(self) -> int | None:
        """How many frames there will be at most; None if that shows only on reading."""
        ...

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """Yield every episode, cut into clips of `clip_frames`. Raises DataError if there is none at all.

        Recordings may share a file that is read once, in order: one that is left for the next and taken up again later
        gives the same clips, but costs a second reading.
        """
        ...


class FittedSource:
    """What sources share whose frames may be of any size, and whose bad episodes show only on reading."""

    video: VideoOptions

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {f"video.{name}": value for name, value in asdict(self.video).items()}

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.video.size, self.video.size

    @property
    def episodes(self) -> int | None:
        return None

    @property
    def frames(self) -> int | None:
        return None


class Names:
    """Keeps the episodes of a source apart, whose ids must be unique."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def take(self, name: str, hint: str) -> None:
        """Raises Unusable, with the hint, if an episode of that name came before."""
        if name in self._seen:
            raise Unusable(f"an episode of this name came before: {hint}")
        self._seen.add(name)


def recording(episode: str, clips: Iterable[Clip]) -> Recording:
    """A recording of clips; Unusable raised among them ends it with a BadVideo of that reason."""
    return Recording(episode, _guarded(episode, clips))


def bad_recording(episode: str, reason: str) -> Recording:
    """A recording of which nothing can be used."""
    return Recording(episode, iter((BadVideo(episode, reason),)))


def _guarded(episode: str, clips: Iterable[Clip]) -> Iterator[Clip | BadVideo]:
    try:
        yield from clips
    except Unusable as error:
        yield BadVideo(episode, str(error))


def make_clips(episode: str, chunks: Iterable[VideoChunk], truth: Truth | None, start: int = 0) -> Iterator[Clip]:
    """A clip of each chunk, the first beginning at frame `start` of the episode, with its part of the ground truth.

    `truth` is that of the video before it was fitted and resampled: a stored frame gets the truth of the frame that it
    shows, and positions are moved with the picture, NaN where they are cut away with it.
    """
    for chunk in chunks:
        part = None if truth is None else _part(truth, chunk)
        yield Clip(episode, start, chunk.frames, chunk.fps, part)
        start += len(chunk.frames)


def _part(truth: Truth, chunk: VideoChunk) -> Truth:
    at = chunk.sources
    positions = None
    if truth.positions is not None:
        corner, side = chunk.boxes[:, None, :2], chunk.boxes[:, None, 2:]
        positions = corner + truth.positions[at] * side
        cut_away = ((positions < 0) | (positions > 1)).any(axis=-1, keepdims=True)
        # What the source itself has just outside of its frame stays as it is: only cutting makes an entity unseen.
        was_in = ((truth.positions[at] >= 0) & (truth.positions[at] <= 1)).all(axis=-1, keepdims=True)
        positions = np.where(cut_away & was_in, np.float32(np.nan), positions).astype(np.float32)
    return Truth(
        actions=None if truth.actions is None else truth.actions[at],
        positions=positions,
        rewards=None if truth.rewards is None else truth.rewards[at],
    )


def check_steps(numbers: Sequence[int], what: str) -> None:
    """Raises Unusable, naming the place, unless sorted whole numbers of frames are evenly spaced."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    for before, after in pairwise(numbers):
        if after == before:
            raise Unusable(f"{what} {after} comes twice")
        if after - before != step:
            raise Unusable(f"{what} goes from {before} to {after}, elsewhere in steps of {min(step, after - before)}")
