"""The source that a command line asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pyarrow.fs import FileSystem

from flam_core.data.sources.arrays import WorldSource
from flam_core.data.sources.base import Source
from flam_core.data.sources.folder import FolderSource
from flam_core.data.sources.lerobot import LeRobotSource
from flam_core.data.sources.parquet import ParquetColumns, ParquetSource
from flam_core.data.sources.webdataset import WebDatasetSource
from flam_core.data.videos import VideoOptions
from flam_core.errors import SettingsError
from flam_core.worlds import make_world

_SOURCES = ("webdataset", "parquet", "lerobot", "world", "videos")
_ONLY_FOR = {
    "image_fps": ("webdataset", "parquet"),
    "camera": ("lerobot",),
    "video_column": ("parquet",),
    "image_column": ("parquet",),
    "episode_column": ("parquet",),
    "index_column": ("parquet",),
    "option": ("world",),
    "fps": ("webdataset", "parquet", "lerobot", "videos"),
}


class Place(Protocol):
    """Where an address leads."""

    @property
    def fs(self) -> FileSystem: ...

    @property
    def path(self) -> str: ...


@dataclass(frozen=True)
class SourceFlags:
    """What is ingested: exactly one of world, videos, webdataset, parquet and lerobot. See docs/data.md."""

    world: str | None = None
    """A built-in world to record."""
    videos: Path | None = None
    """A folder of video files (MP4, MKV, WebM, AVI, MOV, GIF; searched through)."""
    webdataset: str | None = None
    """A folder of tar archives, one archive, or a pattern such as 'clips/train-*.tar'; also s3://."""
    parquet: str | None = None
    """A folder of Parquet files with videos or pictures, one file, or a pattern; also s3://."""
    lerobot: str | None = None
    """A LeRobot data set of format v3; also s3://."""
    size: int = 64
    """Height and width of the stored frames in pixels."""
    episodes: int = 800
    """World: episodes to record."""
    frames: int = 64
    """World: frames of an episode, at most."""
    option: tuple[str, ...] = ()
    """World: a setting of it, such as agents=3. May be given several times."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How frames of another shape become square."""
    fps: float | None = None
    """Resample to this many frames a second; default: keep the source's."""
    image_fps: float | None = None
    """WebDataset, Parquet: how many frames a second pictures are."""
    camera: str | None = None
    """LeRobot: the camera, such as observation.images.top, if there are several."""
    video_column: str | None = None
    """Parquet: column of encoded videos; found by its name by default."""
    image_column: str | None = None
    """Parquet: column of encoded pictures; found by its name by default."""
    episode_column: str | None = None
    """Parquet: column that tells episodes apart; found by its name by default."""
    index_column: str | None = None
    """Parquet: column that orders the pictures of an episode; found by its name by default."""
    licence: str = "unknown"
    """Under which the videos may be used; goes into the manifest."""


def choose_source(flags: SourceFlags, seed: int, resolve: Callable[[str], Place]) -> Source:
    """The source that the flags ask for; `resolve` finds the file system of an address, `seed` is that of a world.

    Raises SettingsError unless exactly one is asked for, with flags that fit it.
    """
    asked = [name for name in _SOURCES if getattr(flags, name) is not None]
    if len(asked) != 1:
        listed = ", ".join(f"--{name}" for name in _SOURCES[:-1])
        raise SettingsError(f"give one of {listed} or --{_SOURCES[-1]}", fix="`--help` shows examples.")
    defaults = SourceFlags()
    for name, fits in _ONLY_FOR.items():
        if getattr(flags, name) != getattr(defaults, name) and asked[0] not in fits:
            raise SettingsError(
                f"--{name} does not go with --{asked[0]}", fix=f"It is for {', '.join(f'--{one}' for one in fits)}."
            )
    if flags.world is not None:
        world = make_world(flags.world, frame_size=flags.size, **_options(flags.option))
        return WorldSource(world, flags.episodes, flags.frames, seed)
    video = VideoOptions(size=flags.size, fit=flags.fit, fps=flags.fps)
    if flags.videos is not None:
        return FolderSource(flags.videos, video, flags.licence)
    place = resolve(getattr(flags, asked[0]))
    if flags.webdataset is not None:
        return WebDatasetSource(place.fs, place.path, video, flags.licence, flags.image_fps)
    if flags.parquet is not None:
        columns = ParquetColumns(flags.video_column, flags.image_column, flags.episode_column, flags.index_column)
        return ParquetSource(place.fs, place.path, video, flags.licence, columns, flags.image_fps)
    return LeRobotSource(place.fs, place.path, video, flags.licence, flags.camera)


def _options(words: tuple[str, ...]) -> dict[str, int | float | str | bool]:
    """`name=value` words as the numbers or words that they hold."""
    found: dict[str, int | float | str | bool] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(f"--option {word} is not name=value", fix="Write it as --option agents=3.")
        found[key] = _value(value)
    return found


def _value(text: str) -> int | float | str | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
