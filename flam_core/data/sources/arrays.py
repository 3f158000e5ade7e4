"""Sources that are already in memory: a built-in world, and any Python iterable of episodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass

import numpy as np
from av.video.frame import VideoFrame

from flam_core.data.shard import Clip, Truth
from flam_core.data.sources.base import FittedSource, Recording, Setting, make_clips, recording
from flam_core.data.sources.truth import make_truth, truth_length
from flam_core.data.videos import Unusable, VideoOptions, cut_frames
from flam_core.errors import SettingsError
from flam_core.worlds.base import Episode, World

AnyEpisode = np.ndarray | tuple[np.ndarray, Truth] | Episode
"""Frames uint8 [T, H, W, 3], RGB, of any size; alone or with their ground truth."""


@dataclass(frozen=True)
class WorldSource:
    """Episodes recorded from a built-in world, with their ground truth."""

    world: World
    episodes: int
    frames_per_episode: int
    seed: int

    @property
    def name(self) -> str:
        return self.world.name

    @property
    def description(self) -> str:
        return repr(self.world) if is_dataclass(self.world) else self.world.name

    @property
    def licence(self) -> str:
        return self.world.licence

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {"world.episodes": self.episodes, "world.frames": self.frames_per_episode, "world.seed": self.seed}

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.world.frame_size, self.world.frame_size

    @property
    def frames(self) -> int:
        return self.episodes * self.frames_per_episode

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`."""
        for index, episode in enumerate(self.world.episodes(self.episodes, self.frames_per_episode, self.seed)):
            name = f"{self.world.name}-{index:08d}"
            yield Recording(name, _cut(name, episode, self.world.fps, clip_frames))


class IteratorSource(FittedSource):
    """Episodes from Python: a list, a generator, a reader of your own format. Read once, one episode at a time."""

    def __init__(
        self,
        name: str,
        episodes: Iterable[AnyEpisode],
        *,
        fps: float,
        video: VideoOptions = VideoOptions(),
        licence: str = "unknown",
    ) -> None:
        """`fps` is the rate of all episodes, frames a second; `video` the size that frames are stored in.

        Raises SettingsError for a rate that is not above 0.
        """
        if not fps > 0:
            raise SettingsError(f"{name}: fps = {fps}", fix="Choose a rate above 0.")
        self.name, self.video, self.licence = name, video, licence
        self._episodes, self._fps = episodes, fps

    @property
    def description(self) -> str:
        return f"episodes of {self.name}"

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {**super().settings, "iterator.fps": self._fps}

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`."""
        for index, episode in enumerate(self._episodes):
            name = f"{self.name}-{index:08d}"
            yield recording(name, self._clips(name, episode, clip_frames))

    def _clips(self, name: str, episode: AnyEpisode, clip_frames: int) -> Iterator[Clip]:
        if isinstance(episode, np.ndarray):
            frames, known = episode, {}
        else:
            frames, truth = episode if isinstance(episode, tuple) else (episode.frames, episode)
            known = {"actions": truth.actions, "positions": truth.positions, "rewards": truth.rewards}
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise Unusable(f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [T, H, W, 3]")
        truth = make_truth(known)
        pictures = (VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24") for frame in frames)
        chunks = cut_frames(pictures, self._fps, self.video, clip_frames, expected=truth_length(truth))
        yield from make_clips(name, chunks, truth)


def _cut(name: str, episode: Episode, fps: float, clip_frames: int) -> Iterator[Clip]:
    """The clips of an episode held in memory."""
    for start in range(0, len(episode.frames), clip_frames):
        part = slice(start, start + clip_frames)
        rewards = None if episode.rewards is None else episode.rewards[part]
        truth = Truth(episode.actions[part], episode.positions[part], rewards)
        yield Clip(name, start, episode.frames[part], fps, truth)
