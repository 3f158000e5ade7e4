"""Where episodes come from: a built-in world or a folder of video files. An ingest sees both as clips, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Protocol

from flam_core.data.shard import Clip, Truth
from flam_core.data.videos import BadVideo, VideoOptions, find_videos, read_video
from flam_core.worlds.base import Episode, World

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
        """Yield every episode, cut into clips of `clip_frames`. Raises DataError if there is none at all."""
        ...


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


@dataclass(frozen=True)
class FolderSource:
    """A folder of video files, one episode each, in the order of their paths."""

    folder: Path
    video: VideoOptions
    licence: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def description(self) -> str:
        return f"videos in {self.name}"

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {f"video.{name}": value for name, value in asdict(self.video).items()}

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.video.size, self.video.size

    @property
    def episodes(self) -> None:
        return None  # bad files are no episodes

    @property
    def frames(self) -> None:
        return None

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`."""
        for path in find_videos(self.folder):
            # A file name need not be text; what does not decode is written out, as Parquet and JSON want UTF-8.
            episode = os.fsencode(path.relative_to(self.folder).as_posix()).decode("utf-8", "backslashreplace")
            yield Recording(episode, self._clips(path, episode, clip_frames))

    def _clips(self, path: Path, episode: str, clip_frames: int) -> Iterator[Clip | BadVideo]:
        start = 0
        for chunk in read_video(path, self.video, clip_frames):
            if isinstance(chunk, BadVideo):
                yield replace(chunk, path=episode)
                return
            yield Clip(episode, start, chunk.frames, chunk.fps)
            start += len(chunk.frames)


def _cut(name: str, episode: Episode, fps: float, clip_frames: int) -> Iterator[Clip]:
    """The clips of an episode held in memory."""
    for start in range(0, len(episode.frames), clip_frames):
        part = slice(start, start + clip_frames)
        rewards = None if episode.rewards is None else episode.rewards[part]
        truth = Truth(episode.actions[part], episode.positions[part], rewards)
        yield Clip(name, start, episode.frames[part], fps, truth)
