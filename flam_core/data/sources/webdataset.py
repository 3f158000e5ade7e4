"""WebDataset: samples as neighbouring files of one key in tar archives, read as streams.

A file's key is its path up to the first dot of its name, the rest is its kind (`a/ep1.mp4`: key `a/ep1`, kind `mp4`).
What makes an episode:

1. A sample with a video (mp4, mkv, webm, avi, mov, gif) is one.
2. Pictures are frames. The name of a picture without its suffix ends in its number; what is before that number (less
   one of `/ . _ -`) is the episode. So `ep1/0001.jpg`, `ep1_0001.jpg` and `ep1.0001.jpg` are all frame 1 of `ep1`.
   Neighbouring pictures of one episode make it up, ordered by number; `0001.jpg` alone belongs to the archive's own.
3. Ground truth is in the `.json` or `.npz` of the episode's own key (fields actions, positions, rewards), or in
   `ep1.actions.npy` and so on.

Other members, such as captions, are passed over; pictures beside a video too (they are previews).
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
from pyarrow.fs import FileSystem

from flam_core.data.images import IMAGE_SUFFIXES, decode_image
from flam_core.data.manifest import one_line
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
from flam_core.data.sources.files import find_files, open_stream, place_name
from flam_core.data.sources.truth import TRUTH_FIELDS, make_truth, truth_length
from flam_core.data.videos import SUFFIXES, Unusable, VideoOptions, cut_frames, cut_video
from flam_core.errors import EnvironmentFault, SettingsError

_TARS = (".tar", ".tar.gz", ".tgz")
_TRUTHS = frozenset({".json", ".npz", ".npy"})
_PICKLES = frozenset({".pkl", ".pickle", ".pyd", ".pt", ".pth", ".joblib"})
_BLOCK = 1 << 20
# What is read into memory at most, so that a small archive that unpacks to much (a bomb) is a bad episode and no more.
_MOST_TRUTH = 64 << 20
"""Bytes of a file with ground truth, and of all that an .npz unpacks to."""
_MOST_EPISODE = 4 << 30
"""Bytes of an episode as it is stored."""
_NUMBER = re.compile(r"(?P<episode>.*?)[/._-]?(?P<number>\d+)", re.DOTALL)


@dataclass(frozen=True)
class WebDatasetSource(FittedSource):
    """Tar archives below a folder or matching a pattern, in the order of their paths. An episode is held in memory as
    it is stored, encoded; its frames are not."""

    fs: FileSystem = field(repr=False)
    path: str
    """A folder, one archive, or a pattern such as `clips/train-*.tar`, on `fs`."""
    video: VideoOptions = VideoOptions()
    licence: str = "unknown"
    image_fps: float | None = None
    """Frames a second of episodes of pictures that do not say it themselves (`"fps"` in their .json)."""

    @property
    def name(self) -> str:
        return place_name(self.path)

    @property
    def description(self) -> str:
        return f"WebDataset {self.name}"

    @property
    def settings(self) -> Mapping[str, Setting]:
        return {**super().settings, "webdataset.image_fps": self.image_fps}

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        """See `Source.recordings`. Raises DataError if there is no archive, SettingsError for pictures without a rate,
        EnvironmentFault if the storage fails."""
        names = Names()
        for path, tar in find_files(self.fs, self.path, _TARS, "tar archives"):
            stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", tar, flags=re.IGNORECASE)
            try:
                for episode in _episodes(_samples(self.fs, path)):
                    name = f"{stem}/{episode.key}" if episode.key else stem
                    yield recording(name, self._clips(names, name, episode, clip_frames))
            except OSError as error:
                raise EnvironmentFault(
                    f"cannot read {path}: {one_line(error)}", fix="Check storage and access."
                ) from error
            except tarfile.TarError as error:
                yield bad_recording(tar, f"not a tar archive: {one_line(error)}")

    def _clips(self, names: Names, name: str, episode: _Episode, clip_frames: int) -> Iterator[Clip]:
        names.take(name, "files of one key must be neighbours in one archive")
        if episode.refused is not None:
            raise Unusable(episode.refused)
        if episode.video is None and not episode.pictures:
            raise Unusable("no video and no pictures, only " + ", ".join(episode.members))
        fields = _fields(episode)
        truth = make_truth(fields)
        expected = truth_length(truth)
        if episode.video is not None:
            chunks = cut_video(io.BytesIO(episode.video), self.video, clip_frames, expected)
        else:
            episode.pictures.sort(key=lambda picture: picture.number)
            check_steps([picture.number for picture in episode.pictures], "picture")
            pictures = (decode_image(picture.content, picture.member) for picture in episode.pictures)
            chunks = cut_frames(pictures, self._rate(name, fields), self.video, clip_frames, expected=expected)
        yield from make_clips(name, chunks, truth)

    def _rate(self, name: str, fields: Mapping[str, Any]) -> float:
        said = fields.get("fps", self.image_fps)
        if said is None:
            raise SettingsError(
                f"{name}: its pictures do not say how many a second they are", fix="Give image_fps (--image_fps 10)."
            )
        try:
            rate = float(said)
        except (TypeError, ValueError):
            rate = 0.0
        if not 0.0 < rate <= 1000.0:
            raise Unusable(f"fps = {said!r}")
        return rate


@dataclass(frozen=True)
class _Picture:
    number: int
    member: str
    content: bytes


@dataclass
class _Sample:
    """Neighbouring members of one key, as far as they matter."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """Content by name; empty for what is passed over."""
    size: int = 0
    """Bytes of all content."""
    refused: str | None = None

    @property
    def has_video(self) -> bool:
        return any(PurePosixPath(name).suffix.lower() in SUFFIXES for name in self.members)

    def add(self, name: str, size: int, content: IO[bytes] | None) -> None:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in _PICKLES:
            self.refused = f"{name} is a pickle, which can run code when it is read: store .json or .npz"
        read = suffix in SUFFIXES | IMAGE_SUFFIXES | _TRUTHS
        most = _MOST_TRUTH if suffix in _TRUTHS else _MOST_EPISODE - self.size
        if read and size > most:
            self.refused = f"{name} has {size} bytes, more than {max(most, 0)}"
            read = False
        self.members[name] = content.read() if read and content is not None else b""
        self.size += len(self.members[name])


@dataclass
class _Episode:
    """Neighbouring samples of one episode."""

    key: str
    members: list[str] = field(default_factory=list)
    video: bytes | None = None
    pictures: list[_Picture] = field(default_factory=list)
    truth: dict[str, bytes] = field(default_factory=dict)
    """Of the whole episode, by the name of the member."""
    frame_truth: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    """Of one picture, by its number: the name of the member, and the member."""
    size: int = 0
    """Bytes of its videos, pictures and ground truth."""
    refused: str | None = None

    def add(self, sample: _Sample) -> None:
        self.size += sample.size
        if self.size > _MOST_EPISODE:  # and none of it is kept
            self.refused = f"more than {_MOST_EPISODE} bytes in one episode"
            self.pictures.clear()
            return
        self.members += [PurePosixPath(member).name for member in sample.members]
        self.refused = self.refused or sample.refused
        pictures = [] if sample.has_video else [name for name in sample.members if _is_picture(name)]
        numbers = [self._add_picture(name, sample.members[name]) for name in pictures]
        for name, content in sample.members.items():
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in SUFFIXES:
                if self.video is not None:
                    self.refused = "several videos in one sample: " + ", ".join(self.members)
                self.video = content
            elif suffix in _TRUTHS:
                if sample.key == self.key:
                    self.truth[name] = content
                elif suffix == ".json" and numbers and numbers[0] is not None:
                    self.frame_truth[numbers[0]] = (name, content)
                else:
                    self.refused = f"{name}: ground truth of one picture must be JSON"

    def _add_picture(self, name: str, content: bytes) -> int | None:
        episode, number = _numbered(name)
        if number is not None and episode == self.key:
            self.pictures.append(_Picture(number, PurePosixPath(name).name, content))
        else:
            self.refused = f"{name}: pictures of other names in one sample, or without a number at the end"
        return number


def _samples(fs: FileSystem, path: str) -> Iterator[_Sample]:
    """The samples of an archive. One that breaks off ends with a refused sample; raises TarError if it has none."""
    sample: _Sample | None = None
    with open_stream(fs, path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*", bufsize=_BLOCK) as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    folder, _, file = name.rpartition("/")
                    if not member.isreg() or file.startswith("."):
                        continue
                    key = f"{folder}/{file.split('.')[0]}".lstrip("/")
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield sample
                        sample = _Sample(key)
                    sample.add(name, member.size, tar.extractfile(member))
        except tarfile.TarError as error:
            if sample is None:
                raise
            sample.refused = f"the archive is truncated or damaged here ({one_line(error)}); what follows is lost"
    if sample is not None:
        yield sample


def _episodes(samples: Iterator[_Sample]) -> Iterator[_Episode]:
    episode: _Episode | None = None
    for sample in samples:
        key = _episode_key(sample)
        if episode is None or episode.key != key:
            if episode is not None:
                yield episode
            episode = _Episode(key)
        episode.add(sample)
    if episode is not None:
        yield episode


def _episode_key(sample: _Sample) -> str:
    """That of its pictures if they are frames, else its own."""
    if not sample.has_video:
        for name in sample.members:
            if _is_picture(name) and _numbered(name)[1] is not None:
                return _numbered(name)[0]
    return sample.key


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _numbered(name: str) -> tuple[str, int | None]:
    """The episode and the number in the name of a picture; no number if it does not end in one."""
    found = _NUMBER.fullmatch(str(PurePosixPath(name).with_suffix("")))
    return (found["episode"], int(found["number"])) if found else (name, None)


def _fields(episode: _Episode) -> dict[str, Any]:
    """The fields of the ground truth, and "fps". Raises Unusable if they cannot be read or contradict each other."""
    fields: dict[str, Any] = {}
    for name, content in episode.truth.items():
        for key, value in _read(name, content).items():
            if key in fields:
                raise Unusable(f"{key} is in several files: {', '.join(sorted(episode.truth))}")
            fields[key] = value
    frames = {number: _read(name, content) for number, (name, content) in sorted(episode.frame_truth.items())}
    for key in [key for key in TRUTH_FIELDS if any(key in frame for frame in frames.values())]:
        if key in fields:
            raise Unusable(f"{key} is told for the episode and for each picture")
        missing = [picture.member for picture in episode.pictures if key not in frames.get(picture.number, {})]
        if missing:
            raise Unusable(f"{key} of picture {missing[0]} is missing")
        fields[key] = [frame[key] for frame in frames.values()]
    return fields


def _read(name: str, content: bytes) -> dict[str, Any]:
    """The fields that matter of a member with ground truth."""
    file = PurePosixPath(name).name
    if file.count(".") < 2 and name.endswith(".npy"):
        raise Unusable(f"{file}: say what it holds: {file[:-4]}.actions.npy, .positions.npy or .rewards.npy")
    try:
        if name.endswith(".json"):
            found = json.loads(content)
            if not isinstance(found, dict):
                raise Unusable(f"{file}: not a JSON object")
        else:
            if name.endswith(".npz"):
                with zipfile.ZipFile(io.BytesIO(content)) as packed:
                    if sum(one.file_size for one in packed.infolist()) > _MOST_TRUTH:
                        raise Unusable(f"{file}: unpacks to more than {_MOST_TRUTH} bytes")
            loaded = np.load(io.BytesIO(content), allow_pickle=False)
            found = loaded if isinstance(loaded, np.lib.npyio.NpzFile) else {file.split(".")[-2]: loaded}
        return {key: found[key] for key in (*TRUTH_FIELDS, "fps") if key in found}
    except RecursionError as error:
        raise Unusable(f"{file}: nested too deeply") from error
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise Unusable(f"{file}: cannot be read: {one_line(error)}") from error
