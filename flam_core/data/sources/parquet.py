"""Parquet: a row a video, or a row a picture grouped to episodes; read by row groups, never a file whole."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem

from flam_core.data.images import decode_image
from flam_core.data.shard import Clip
from flam_core.data.sources.base import (
    FittedSource,
    Names,
    Recording,
    Setting,
    bad_recording,
    check_steps,
    make_clips,
    recording,
)
from flam_core.data.sources.files import did_you_mean, find_files, open_parquet, place_name
from flam_core.data.sources.truth import make_truth, truth_length
from flam_core.data.videos import BadVideo, Unusable, VideoOptions, cut_frames, cut_video
from flam_core.errors import SettingsError

_BATCH_ROWS = 16
_VIDEO_NAMES = ("video", "mp4", "clip", "video_bytes")
_IMAGE_NAMES = ("image", "frame", "img", "picture", "observation.image", "jpg", "png")
_EPISODE_NAMES = ("episode", "episode_index", "episode_id", "video_id", "clip_id", "sequence")
_INDEX_NAMES = ("frame_index", "index", "frame", "step", "timestep", "t")
_TRUTH_NAMES = {"actions": ("actions", "action"), "positions": ("positions",), "rewards": ("rewards", "reward")}


@dataclass(frozen=True)
class ParquetColumns:
    """Which columns are read; None finds one by its name and type. See docs/data.md for the names."""

    video: str | None = None
    """Encoded videos, a row each: binary, or a struct with `bytes`."""
    image: str | None = None
    """Encoded pictures, a row each: binary, or a struct with `bytes`."""
    episode: str | None = None
    """What rows of one episode have in common; they must be neighbours. Rows of videos can do without."""
    index: str | None = None
    """Whole number that orders the pictures of an episode; without it they are in the order of rows."""


@dataclass(frozen=True)
class ParquetSource(FittedSource):
    """Parquet files below a folder or matching a pattern, in the order of their paths. One episode is held in memory as
    it is stored, encoded; its frames are not."""

    fs: FileSystem = field(repr=False)
    path: str
    """A folder, one file, or a pattern such as `clips/train-*.parquet`, on `fs`."""
    video: VideoOptions = VideoOptions()
    licence: str = "unknown"
    columns: ParquetColumns = ParquetColumns()
    image_fps: float | None = None
    """Frames a second of pictures."""

    @property
    def name(self) -> str:
        return place_name(self.path)

    @property
    def description(self) -> str:
        return f"Parquet {self.name}"

    @property
    def settings(self) -> Mapping[str, Setting]:
        columns = {
            f"parquet.{name}_column": getattr(self.columns, name) for name in ("video", "image", "episode", "index")
        }
        return {**super().settings, **columns, "parquet.image_fps": self.image_fps}

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`. Raises DataError if there is no file, SettingsError if a column is missing in the
        first one or pictures have no rate, EnvironmentFault if the storage fails."""
        names = Names()
        for episode in _episodes(self._rows()):
            if isinstance(episode, BadVideo):
                yield bad_recording(episode.path, episode.reason)
            else:
                yield recording(episode.name, self._clips(names, episode, clip_frames))

    def _rows(self) -> Iterator[_Row | BadVideo]:
        """All rows of all files, and a BadVideo after the good rows of each damaged file."""
        plan: _Plan | None = None
        for path, file in find_files(self.fs, self.path, (".parquet",), "Parquet files"):
            try:
                with open_parquet(self.fs, path) as table:
                    there = table.schema_arrow.names
                    if plan is None:
                        plan = _Plan.of(table.schema_arrow, self.columns, file)
                        self._check_rate(plan, file)
                    if missing := [name for name in plan.columns if name not in there]:
                        raise Unusable(f"no column {', '.join(missing)}, unlike the files before it")
                    stem, number = file.removesuffix(".parquet"), 0
                    for batch in table.iter_batches(_BATCH_ROWS, columns=list(plan.columns)):
                        for row in batch.to_pylist():
                            yield plan.row(row, f"{stem}/{number:06d}")
                            number += 1
            except Unusable as error:
                yield BadVideo(file, str(error))

    def _check_rate(self, plan: _Plan, file: str) -> None:
        if not plan.is_video and self.image_fps is None:
            raise SettingsError(
                f"{file}: its pictures do not say how many a second they are", fix="Give image_fps (--image_fps 10)."
            )

    def _clips(self, names: Names, episode: _Episode, clip_frames: int) -> Iterator[Clip]:
        names.take(episode.name, "rows of one episode must be neighbours, and numbered through all files")
        if episode.refused is not None:
            raise Unusable(episode.refused)
        if not episode.rows[0].is_video:
            yield from self._clips_of_pictures(episode, clip_frames)
            return
        start = 0
        for row in episode.rows:
            truth = make_truth(row.truth)
            chunks = cut_video(io.BytesIO(row.content), self.video, clip_frames, truth_length(truth))
            for clip in make_clips(episode.name, chunks, truth, start):
                yield clip
                start += len(clip.frames)

    def _clips_of_pictures(self, episode: _Episode, clip_frames: int) -> Iterator[Clip]:
        assert self.image_fps is not None
        rows = episode.rows
        numbers = [row.number for row in rows if row.number is not None]
        if numbers and len(numbers) < len(rows):
            raise Unusable("rows without a number")
        if numbers:
            rows = sorted(rows, key=lambda row: row.number or 0)
            check_steps(sorted(numbers), "picture")
        fields = {name: [row.truth[name] for row in rows] for name in rows[0].truth}
        truth = make_truth({name: values for name, values in fields.items() if any(v is not None for v in values)})
        pictures = (decode_image(row.content, row.name) for row in rows)
        chunks = cut_frames(pictures, self.image_fps, self.video, clip_frames, expected=truth_length(truth))
        yield from make_clips(episode.name, chunks, truth)


@dataclass(frozen=True)
class _Row:
    """A video or a picture."""

    name: str
    episode: str | None
    is_video: bool
    content: bytes
    number: int | None
    truth: Mapping[str, Any]


@dataclass
class _Episode:
    """Neighbouring rows of one episode, in the order of the files."""

    name: str
    rows: list[_Row]
    refused: str | None = None


def _episodes(rows: Iterator[_Row | BadVideo]) -> Iterator[_Episode | BadVideo]:
    episode: _Episode | None = None
    for row in rows:
        if isinstance(row, BadVideo):
            if episode is not None:
                if episode.rows[0].episode is not None:
                    episode.refused = f"{row.path}, where it may go on, is bad"
                yield episode
                episode = None
            yield row
        elif episode is not None and row.episode is not None and row.episode == episode.name:
            episode.rows.append(row)
        else:
            if episode is not None:
                yield episode
            episode = _Episode(row.name if row.episode is None else row.episode, [row])
    if episode is not None:
        yield episode


@dataclass(frozen=True)
class _Plan:
    """The columns to read."""

    is_video: bool
    content: str
    episode: str | None
    index: str | None
    truth: Mapping[str, str]
    """Column of each field of the ground truth."""

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.content, self.episode, self.index, *self.truth.values())
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def row(self, row: Mapping[str, Any], name: str) -> _Row:
        value = row[self.content]
        content = value.get("bytes") if isinstance(value, dict) else value
        return _Row(
            name=name,
            episode=None if self.episode is None else str(row[self.episode]),
            is_video=self.is_video,
            content=content or b"",
            number=None if self.index is None else row[self.index],
            truth={field: row[column] for field, column in self.truth.items()},
        )

    @staticmethod
    def of(schema: pa.Schema, wanted: ParquetColumns, file: str) -> _Plan:
        """Raises SettingsError if a column named is missing or of another type, or one needed cannot be guessed."""
        for name in (wanted.video, wanted.image, wanted.episode, wanted.index):
            if name is not None and name not in schema.names:
                raise SettingsError(
                    f"{file}: there is no column {name!r}",
                    fix=f"{did_you_mean(name, schema.names)} The columns are {', '.join(schema.names)}.".strip(),
                )
        is_video, content = _content(schema, wanted, file)
        keys = [f.name for f in schema if _is_key(f.type) and f.name != content]
        whole = [f.name for f in schema if pa.types.is_integer(f.type)]
        episode = wanted.episode or _first(_EPISODE_NAMES, keys)
        if episode is None and not is_video:
            raise SettingsError(
                f"{file}: no column says which episode a picture is of",
                fix=f"Give --episode_column, one of: {', '.join(keys) or 'none fits'}.",
            )
        index = None if is_video else wanted.index or _first(_INDEX_NAMES, [name for name in whole if name != episode])
        if index is not None and index not in whole:
            raise SettingsError(
                f"{file}: column {index!r} is not of whole numbers", fix="Choose another --index_column."
            )
        numbers = [f.name for f in schema if _is_numeric(f.type) and f.name not in (episode, index)]
        truth = {name: _first(names, numbers) for name, names in _TRUTH_NAMES.items()}
        return _Plan(is_video, content, episode, index, {k: v for k, v in truth.items() if v is not None})


def _content(schema: pa.Schema, wanted: ParquetColumns, file: str) -> tuple[bool, str]:
    """Whether rows are videos, and the column with their bytes."""
    if wanted.video is not None and wanted.image is not None:
        raise SettingsError("rows are either videos or pictures", fix="Give --video_column or --image_column.")
    fit = [field.name for field in schema if _is_bytes(field.type)]
    if (named := wanted.video or wanted.image) is not None:
        if named not in fit:
            raise SettingsError(
                f"{file}: column {named!r} is {schema.field(named).type}, not binary or a struct with bytes",
                fix=f"Columns that are: {', '.join(fit) or 'none'}.",
            )
        return wanted.video is not None, named
    video, image = _first(_VIDEO_NAMES, fit, "video"), _first(_IMAGE_NAMES, fit, "image")
    if video is not None and image is None:
        return True, video
    if image is not None and video is None:
        return False, image
    raise SettingsError(
        f"{file}: cannot tell which column holds the videos or pictures; binary columns: {', '.join(fit) or 'none'}; "
        f"all columns: {', '.join(schema.names)}",
        fix="Give --video_column or --image_column.",
    )


def _first(names: tuple[str, ...], there: list[str], part: str | None = None) -> str | None:
    """The first of the names that is there; else the only one there that has `part` in its name."""
    for name in names:
        if name in there:
            return name
    like = [name for name in there if part is not None and part in name.lower()]
    return like[0] if len(like) == 1 else None


def _is_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.StructType):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_key(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_numeric(kind: pa.DataType) -> bool:
    while isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        kind = kind.value_type
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)
