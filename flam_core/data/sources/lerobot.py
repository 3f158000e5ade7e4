"""LeRobot data sets, format v3: many episodes in one MP4 a camera, and their actions in Parquet.

Read are `meta/info.json`, `meta/episodes/**.parquet` (where each episode lies), the MP4 files of one camera, each once
from its beginning to its end, and of `data/**.parquet` the columns action, next.reward and episode_index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from av.video.frame import VideoFrame
from pyarrow.fs import FileSystem

from flam_core.data.manifest import one_line
from flam_core.data.shard import Clip, Truth
from flam_core.data.sources.base import FittedSource, Recording, Setting, make_clips, recording
from flam_core.data.sources.files import did_you_mean, find_files, open_parquet, open_video_file, place_name
from flam_core.data.sources.truth import make_truth
from flam_core.data.videos import OpenVideo, Unusable, VideoOptions, cut_frames, open_video
from flam_core.errors import DataError, EnvironmentFault, SettingsError

_TRUTH_COLUMNS = {"actions": "action", "rewards": "next.reward"}
_FIX = "Is it a whole data set of LeRobot v3?"


@dataclass(frozen=True)
class LeRobotSource(FittedSource):
    """One camera of a LeRobot data set. Its actions [T, 1, A] and, if it has them, rewards are the ground truth."""

    fs: FileSystem = field(repr=False)
    path: str
    """Folder that holds `meta/info.json`, on `fs`."""
    video: VideoOptions = VideoOptions()
    licence: str = "unknown"
    camera: str | None = None
    """Feature with the video, such as `observation.images.top`; None if there is only one."""

    @property
    def name(self) -> str:
        return place_name(self.path)

    @property
    def description(self) -> str:
        return f"LeRobot data set {self.name}"

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {**super().settings, "lerobot.camera": self.camera}

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`, in the order of the video files and of the episodes in each.

        Raises DataError for another format or version, SettingsError for a camera that it has not, EnvironmentFault if
        the storage fails.
        """
        root = self.path.rstrip("/")
        info = _Info.read(self.fs, root, self.camera)
        rows = _Rows(self.fs, root, info)
        for file, episodes in groupby(_places(self.fs, root, info), key=lambda place: place.video):
            with _Reel(self.fs, f"{root}/{file}", file, info.fps) as reel:
                for place in episodes:
                    name = f"episode-{place.episode:06d}"
                    yield recording(name, self._clips(name, place, reel, rows, info.fps, clip_frames))

    def _clips(
        self, name: str, place: _Place, reel: _Reel, rows: _Rows, fps: float, clip_frames: int
    ) -> Iterator[Clip]:
        truth = rows.truth(place)
        chunks = cut_frames(reel.frames(place), fps, self.video, clip_frames, aspect=reel.aspect)
        yield from make_clips(name, chunks, truth)


@dataclass(frozen=True)
class _Info:
    """What `meta/info.json` says."""

    fps: float
    camera: str
    video_path: str
    data_path: str
    truth: Mapping[str, str]
    """Column of each field of the ground truth that there is."""

    @staticmethod
    def read(fs: FileSystem, root: str, camera: str | None) -> _Info:
        where = f"{root}/meta/info.json"
        try:
            with fs.open_input_stream(where, compression=None) as stream:
                info = json.loads(stream.read())
        except FileNotFoundError as error:
            raise DataError(f"{root} has no meta/info.json", fix="Give the folder of a LeRobot data set.") from error
        except OSError as error:
            raise EnvironmentFault(
                f"cannot read {where}: {one_line(error)}", fix="Check storage and access."
            ) from error
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {one_line(error)}", fix=_FIX) from error
        version = str(info.get("codebase_version")) if isinstance(info, dict) else "none"
        if not version.startswith("v3."):
            raise DataError(
                f"{root} is of LeRobot format {version}, flam reads v3",
                fix="Convert it with LeRobot's own script (convert_dataset_v21_to_v30)."
                if version.startswith("v2")
                else _FIX,
            )
        try:
            features = {str(key): str(value["dtype"]) for key, value in info["features"].items()}
            fps, data_path, video_path = float(info["fps"]), str(info["data_path"]), str(info["video_path"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where} lacks fps, features, data_path or video_path", fix=_FIX) from error
        if not 0 < fps <= 1000:
            raise DataError(f"{where}: fps = {fps}", fix=_FIX)
        truth = {name: column for name, column in _TRUTH_COLUMNS.items() if column in features}
        return _Info(fps, _camera(root, features, camera), video_path, data_path, truth)


def _camera(root: str, features: Mapping[str, str], wanted: str | None) -> str:
    """The feature whose videos are read."""
    cameras = [name for name, kind in features.items() if kind == "video"]
    pictures = [name for name, kind in features.items() if kind == "image"]
    if wanted in pictures or (not cameras and pictures):
        raise DataError(
            f"{root} stores {wanted or pictures[0]} as pictures in Parquet, not as video",
            fix=f"Use --parquet {root}/data --image_column {wanted or pictures[0]} --image_fps FPS.",
        )
    if not cameras:
        raise DataError(f"{root} has no camera: no feature is a video", fix=f"Features: {', '.join(features)}.")
    if wanted is None and len(cameras) > 1:
        raise SettingsError(f"{root} has {len(cameras)} cameras", fix=f"Give --camera, one of: {', '.join(cameras)}.")
    if wanted is not None and wanted not in cameras:
        raise SettingsError(
            f"{root} has no camera {wanted!r}",
            fix=f"{did_you_mean(wanted, cameras)} The cameras are {', '.join(cameras)}.".strip(),
        )
    return wanted or cameras[0]


@dataclass(frozen=True)
class _Place:
    """Where an episode lies."""

    episode: int
    length: int
    """Frames."""
    video: str
    """Path of the MP4 below the data set."""
    start: float
    """Second of that MP4 at which its first frame is shown."""
    data: str
    """Path of the Parquet file with its rows."""


def _places(fs: FileSystem, root: str, info: _Info) -> list[_Place]:
    """All episodes, in the order of the video files and of time in each."""
    video = f"videos/{info.camera}"
    columns = [
        "episode_index",
        "length",
        "data/chunk_index",
        "data/file_index",
        f"{video}/chunk_index",
        f"{video}/file_index",
        f"{video}/from_timestamp",
    ]
    places = []
    for path, _ in find_files(fs, f"{root}/meta/episodes", (".parquet",), "episodes"):
        for row in _read_table(fs, path, columns).to_pylist():
            try:
                places.append(
                    _Place(
                        episode=int(row["episode_index"]),
                        length=int(row["length"]),
                        video=_path(
                            info.video_path, row[f"{video}/chunk_index"], row[f"{video}/file_index"], info.camera
                        ),
                        start=float(row[f"{video}/from_timestamp"]),
                        data=_path(info.data_path, row["data/chunk_index"], row["data/file_index"], info.camera),
                    )
                )
            except TypeError as error:
                raise DataError(f"{path}: an episode has no place", fix=_FIX) from error
    if not places:
        raise DataError(f"{root} has no episodes", fix=_FIX)
    return sorted(places, key=lambda place: (place.video, place.start, place.episode))


def _path(template: str, chunk: int, file: int, camera: str) -> str:
    """A path below the data set, by a template of info.json."""
    try:
        path = template.format(video_key=camera, chunk_index=chunk, file_index=file)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"info.json: path {template!r} cannot be filled in", fix=_FIX) from error
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise DataError(f"info.json: path {template!r} leads out of the data set", fix=_FIX)
    return path


def _read_table(fs: FileSystem, path: str, columns: list[str]) -> pa.Table:
    """Columns of a Parquet file. Raises DataError if they are not there, EnvironmentFault if the storage fails."""
    try:
        with open_parquet(fs, path) as table:
            if missing := [name for name in columns if name not in table.schema_arrow.names]:
                raise Unusable(f"no column {', '.join(missing)}")
            return table.read(columns=columns)
    except Unusable as error:
        raise DataError(f"{path}: {error}", fix=_FIX) from error


class _Rows:
    """The rows of the frames. Keeps the last file read: neighbouring episodes share it."""

    def __init__(self, fs: FileSystem, root: str, info: _Info) -> None:
        self._fs, self._root, self._truth = fs, root, info.truth
        self._path: str | None = None
        self._table = pa.table({})

    def truth(self, place: _Place) -> Truth | None:
        """Actions and rewards of an episode. Raises Unusable if they are missing or not of all its frames."""
        if not self._truth:
            return None
        if self._path != place.data:
            columns = ["episode_index", "frame_index", *self._truth.values()]
            try:
                self._table = _read_table(self._fs, f"{self._root}/{place.data}", columns)
            except DataError as error:
                raise Unusable(error.what.removeprefix(f"{self._root}/")) from error
            self._path = place.data
        rows = self._table.filter(pc.field("episode_index") == place.episode).sort_by("frame_index")
        if rows["frame_index"].to_pylist() != list(range(place.length)):
            raise Unusable(f"{place.data} has {len(rows)} rows of its {place.length} frames, or others")
        fields: dict[str, Any] = {name: rows[column].to_pylist() for name, column in self._truth.items()}
        if "rewards" in fields:  # LeRobot keeps a scalar as a list of one number in some versions
            fields["rewards"] = [one[0] if isinstance(one, list) and one else one for one in fields["rewards"]]
        return make_truth(fields)


class _Reel:
    """An MP4 of many episodes, decoded once as long as they are read in order of time."""

    def __init__(self, fs: FileSystem, path: str, name: str, fps: float, start: float = 0.0) -> None:
        """Nothing before `start`, in seconds, will be asked for."""
        self._fs, self._path, self._name, self._fps, self._start = fs, path, name, fps, start
        self._stack = ExitStack()
        self._opened: OpenVideo | None = None
        self._held: VideoFrame | None = None
        self._bad: str | None = None
        self._turn = 0

    def __enter__(self) -> _Reel:
        try:
            file = open_video_file(self._fs, self._path)
            if not isinstance(file, Path):
                self._stack.callback(file.close)
            self._opened = self._stack.enter_context(open_video(file, self._start))
        except FileNotFoundError:
            self._bad = "missing"
        except Unusable as error:
            self._bad = str(error)
        return self

    def __exit__(self, *error: object) -> None:
        self._turn += 1
        self._stack.close()

    @property
    def aspect(self) -> float:
        """Width of a stored pixel over its height."""
        return 1.0 if self._opened is None else self._opened.aspect

    def frames(self, place: _Place) -> Iterator[VideoFrame]:
        """The frames of an episode. Raises Unusable if one is missing, or the file is damaged before its end."""
        self._turn += 1
        turn = self._turn
        for due in range(place.length):
            if turn != self._turn:
                # Another episode was begun since, and has passed over the rest of this one.
                yield from self._again(place, due)
                return
            yield self._frame(place, due)

    def _again(self, place: _Place, due: int) -> Iterator[VideoFrame]:
        with _Reel(self._fs, self._path, self._name, self._fps, place.start + due / self._fps) as reel:
            for number in range(due, place.length):
                yield reel._frame(place, number)

    def _frame(self, place: _Place, due: int) -> VideoFrame:
        """Frame number `due` of an episode; frames before it are passed over."""
        while True:
            frame = self._next()
            if frame is None:
                raise Unusable(f"{self._name} ends after {due} of its {place.length} frames")
            number = round(((frame.time or 0.0) - place.start) * self._fps)
            if number > due:
                self._held = frame
                raise Unusable(f"{self._name} lacks its frame {due} of {place.length}")
            if number == due:
                return frame

    def _next(self) -> VideoFrame | None:
        """The next frame; the same reason again and again once the file broke off."""
        if self._bad is None and self._held is not None:
            frame, self._held = self._held, None
            return frame
        try:
            if self._bad is None and self._opened is not None:
                return next(self._opened.frames, None)
        except Unusable as error:
            self._bad = str(error)
        raise Unusable(f"{self._name}: {self._bad}")
