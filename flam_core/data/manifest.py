"""The manifest of a data set: all that a reader must know to plan every read, in one JSON file written last.

A data set is a folder or a prefix in a bucket that holds `manifest.json`, `quarantine.json` (what was left out, and
why) and `shards/*.parquet`. Readers never list it: names, sizes, hashes, clip lengths and row groups are all here.
The text is canonical JSON without any time of day, so equal data give an equal manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pyarrow.fs import FileSystem
from pydantic import ConfigDict, TypeAdapter, ValidationError

from flam_core.data.codec import STORED_CODECS
from flam_core.errors import DataError, EnvironmentFault

SCHEMA_VERSION = 2
SPLITS = ("train", "val", "test")
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.json"

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARD_NAME = re.compile(r"shards/[A-Za-z0-9][A-Za-z0-9._-]*\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of clips that all belong to one split. Raises DataError if its parts do not agree."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: str
    """Path below the data set: `shards/<file>.parquet`."""
    split: str
    """train, val or test."""
    bytes: int
    sha256: str
    """Of the whole file, 64 hex digits."""
    clips: int
    frames: int
    clip_frames: tuple[int, ...]
    """Length of each clip in frames, in row order."""
    row_groups: tuple[int, ...]
    """Clips in each row group, in file order."""

    def __post_init__(self) -> None:
        for holds, problem in (
            (_SHARD_NAME.fullmatch(self.name), "its name is not shards/<file>.parquet"),
            (self.split in SPLITS, f"its split {self.split!r} is none of {', '.join(SPLITS)}"),
            (self.bytes > 0, f"it has {self.bytes} bytes"),
            (_SHA256.fullmatch(self.sha256), "its sha256 is not 64 hex digits"),
            (self.clips > 0 and len(self.clip_frames) == self.clips, "clips and clip_frames differ in number"),
            (all(length > 0 for length in self.clip_frames), "a clip has no frames"),
            (sum(self.clip_frames) == self.frames, "frames is not the sum of clip_frames"),
            (all(clips > 0 for clips in self.row_groups), "a row group has no clips"),
            (sum(self.row_groups) == self.clips, "clips is not the sum of row_groups"),
        ):
            if not holds:
                raise DataError(f"manifest: shard {self.name!r}: {problem}", fix=_DAMAGED)


@dataclass(frozen=True)
class Manifest:
    """What a data set holds. Raises DataError if its parts do not agree."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: str
    source: str
    """What was ingested, in words: a world with its settings, or the name of a folder."""
    licence: str
    settings: Mapping[str, str | int | float | bool | None]
    """How it was ingested: equal source and settings give an equal manifest."""
    codec: str
    """How every clip is coded: what was measured to be best, if the settings ask for `auto`."""
    frame_size: tuple[int, int]
    """(height, width) of every frame in pixels."""
    fps: float | None
    """Frames a second; None where episodes differ (each row then holds its own)."""
    has_truth: bool
    """True if every clip has actions and positions."""
    episodes: Mapping[str, int]
    """Episodes in each split. No episode is in two."""
    clips: int
    frames: int
    shards: tuple[Shard, ...]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise _other_version(self.schema_version)
        clips = Counter[str]()
        for shard in self.shards:
            clips[shard.split] += shard.clips
        for holds, problem in (
            (
                NAME_PATTERN.fullmatch(self.name),
                f"name {self.name!r} has characters it must not have",
            ),
            (self.codec in STORED_CODECS, f"codec {self.codec!r} is none of {', '.join(STORED_CODECS)}"),
            (min(self.frame_size) > 0, f"frame_size is {self.frame_size}"),
            (self.fps is None or self.fps > 0, f"fps is {self.fps}"),
            (tuple(sorted(self.episodes)) == tuple(sorted(SPLITS)), f"episodes names {sorted(self.episodes)}"),
            (all(clips[split] >= self.episodes.get(split, 0) > 0 for split in SPLITS), "a split is empty"),
            (self.clips == clips.total(), "clips is not the sum over shards"),
            (self.frames == sum(shard.frames for shard in self.shards), "frames is not the sum over shards"),
            (len({shard.name for shard in self.shards}) == len(self.shards), "two shards share a name"),
        ):
            if not holds:
                raise DataError(f"manifest: {problem}", fix=_DAMAGED)

    @property
    def total_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Identity of the data set: sha256 of `to_json()`, which is also that of the file."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split, in order. Raises DataError for an unknown split."""
        if name not in SPLITS:
            raise DataError(f"no split {name!r}", fix=f"Choose one of {', '.join(SPLITS)}.")
        return tuple(shard for shard in self.shards if shard.split == name)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII, one newline at the end."""
        content = {**vars(self), "shards": [vars(shard) for shard in self.shards]}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @staticmethod
    def from_json(text: bytes | str) -> Manifest:
        """The inverse of `to_json`. Raises DataError, naming the first field that is wrong."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            # Another version has other fields, and its number says more than the first that differs.
            version = _version(text)
            if version is not None and version != SCHEMA_VERSION:
                raise _other_version(version) from error
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(f"manifest: {where}: {first['msg']}", fix=_DAMAGED) from error


_ADAPTER = TypeAdapter(Manifest)
_DAMAGED = "The manifest is damaged or not flam's: ingest the data set again."


def _version(text: bytes | str) -> int | None:
    """The schema version that a text gives, if it is the JSON of an object and gives one."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    found = content.get("schema_version") if isinstance(content, dict) else None
    return found if isinstance(found, int) else None


def _other_version(version: int) -> DataError:
    return DataError(
        f"manifest: schema version {version}, this flam reads version {SCHEMA_VERSION}",
        fix="Use the flam that wrote the data set, or ingest it anew.",
    )


def read_manifest(fs: FileSystem, path: str) -> Manifest:
    """The manifest of the data set at `path` (its folder or prefix, as `fs` names it).

    Raises DataError if there is no data set or its manifest is broken, EnvironmentFault if the storage does not answer.
    """
    where = f"{path}/{MANIFEST_NAME}"
    try:
        with fs.open_input_stream(where) as stream:
            text = stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"no data set at {path}: {MANIFEST_NAME} is missing",
            fix="Check the address; an ingest that did not finish leaves no manifest.",
        ) from error
    except OSError as error:
        raise EnvironmentFault(f"cannot read {where}: {one_line(error)}", fix="Check storage and access.") from error
    try:
        return Manifest.from_json(text)
    except DataError as error:
        raise DataError(f"{where}: {error.what}", fix=error.fix) from error


def write_manifest(fs: FileSystem, path: str, manifest: Manifest) -> None:
    """Write `manifest` for the data set at `path`, whole or not at all. Raises OSError if the storage refuses."""
    if fs.type_name != "local":  # an object appears when its upload is complete
        with fs.open_output_stream(f"{path}/{MANIFEST_NAME}") as stream:
            stream.write(manifest.to_json())
        return
    part = f"{path}/.{MANIFEST_NAME}.part"
    with fs.open_output_stream(part) as stream:
        stream.write(manifest.to_json())
    fs.move(part, f"{path}/{MANIFEST_NAME}")


def one_line(error: BaseException) -> str:
    """The message of a library's error without line breaks, for use within ours."""
    return " ".join(str(error).split()) or type(error).__name__
