"""The quarantine of a data set: what is left out of it, and why, in `quarantine.json` beside the manifest.

Two things are left out. Sources (files, episodes) that could not be ingested are not in the shards at all. Clips that
are in the shards but damaged are named by shard and row, so that a plan leaves them out before training starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from pyarrow.fs import FileSystem
from pydantic import ConfigDict, TypeAdapter, ValidationError

from flam_core.data.manifest import QUARANTINE_NAME, Manifest, Shard, one_line
from flam_core.errors import DataError, EnvironmentFault, SettingsError

SCHEMA_VERSION = 1
MAX_BAD_SHARE = 0.01
"""Share of a data set's clips that may be left out unless a program is told otherwise."""

_SHOWN = 20
_FIX_READ = "Restore it, or delete it and verify the data set again (the list of sources left out is then lost)."
_FIX_STORAGE = "Check storage and access."


@dataclass(frozen=True)
class BadSource:
    """A file or episode that was left out at ingest."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    path: str
    """Relative to the source."""
    reason: str


@dataclass(frozen=True)
class BadClip:
    """A clip, or a whole shard, that cannot be used. Raises DataError if its parts do not agree."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    shard: str
    """As in the manifest."""
    row: int | None
    """Index of the clip in the shard; None leaves out all of the shard."""
    clip: str | None
    """Id of the clip, for people; None for a whole shard or where it cannot be read."""
    reason: str

    def __post_init__(self) -> None:
        if self.row is not None and self.row < 0:
            raise DataError(f"quarantine: shard {self.shard}: row {self.row}", fix=_FIX_READ)
        if self.row is None and self.clip is not None:
            raise DataError(f"quarantine: shard {self.shard}: clip {self.clip} has no row", fix=_FIX_READ)

    def __str__(self) -> str:
        if self.row is None:
            return f"{self.shard}, the whole shard: {self.reason}"
        name = "" if self.clip is None else f" ({self.clip})"
        return f"{self.shard}, row {self.row}{name}: {self.reason}"


@dataclass(frozen=True)
class Quarantine:
    """What is left out of a data set. Entries are sorted and kept once: the order of discovery does not matter.

    Raises DataError for an unknown schema version.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    sources: tuple[BadSource, ...] = ()
    clips: tuple[BadClip, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise DataError(
                f"quarantine: schema version {self.schema_version}, this flam reads version {SCHEMA_VERSION}",
                fix="Use the flam that wrote it, or delete it and verify the data set again.",
            )
        sources = sorted(set(self.sources), key=lambda bad: (bad.path, bad.reason))
        clips = sorted(set(self.clips), key=lambda bad: (bad.shard, _row_key(bad.row), bad.clip or "", bad.reason))
        object.__setattr__(self, "sources", tuple(sources))
        object.__setattr__(self, "clips", tuple(clips))

    @cached_property
    def sha256(self) -> str:
        """Identity of what is left out of the shards: 64 hex digits, "" when nothing is.

        Reasons do not enter: other words for the same clips are the same data.
        """
        if not self.clips:
            return ""
        left_out = sorted({(bad.shard, _row_key(bad.row)) for bad in self.clips})
        return hashlib.sha256(json.dumps(left_out, separators=(",", ":")).encode()).hexdigest()

    def rows(self, shard: Shard) -> frozenset[int]:
        """Rows of `shard` that are left out."""
        rows = self._rows.get(shard.name, frozenset())
        return frozenset(range(shard.clips)) if None in rows else frozenset(row for row in rows if row is not None)

    def bad_clips(self, manifest: Manifest) -> int:
        """Clips of the data set that are left out."""
        return sum(len(self.rows(shard)) for shard in manifest.shards)

    def share(self, manifest: Manifest) -> float:
        """Share of the data set's clips that are left out, 0 to 1."""
        return self.bad_clips(manifest) / manifest.clips

    def check(self, manifest: Manifest, max_bad_share: float = MAX_BAD_SHARE) -> None:
        """Raise DataError if more than `max_bad_share` (0 to 1) of the clips are left out, naming the first 20.

        Also if an entry names what `manifest` has not. SettingsError for a share that is none.
        """
        check_share(max_bad_share)
        clips = {shard.name: shard.clips for shard in manifest.shards}
        for bad in self.clips:
            if bad.shard not in clips or (bad.row is not None and bad.row >= clips[bad.shard]):
                row = "" if bad.row is None else f", row {bad.row},"
                raise DataError(
                    f"{QUARANTINE_NAME} names shard {bad.shard}{row} which the manifest has not",
                    fix="It is of other data: verify the data set again.",
                )
        count = self.bad_clips(manifest)
        if count <= max_bad_share * manifest.clips:
            return
        shown = [str(bad) for bad in self.clips[:_SHOWN]]
        if len(self.clips) > _SHOWN:
            shown.append(f"and {len(self.clips) - _SHOWN} more")
        raise DataError(
            f"{count} of {manifest.clips} clips bad ({count / manifest.clips:.2%}), at most {max_bad_share:.2%} may be"
            f": {'; '.join(shown)}",
            fix="Restore the shards and verify again, ingest again, or raise --max_bad_share.",
        )

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, sorted entries, ASCII, one space of indent, one newline at the end."""
        content = {
            "schema_version": self.schema_version,
            "sources": [vars(bad) for bad in self.sources],
            "clips": [vars(bad) for bad in self.clips],
        }
        return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(text: bytes) -> Quarantine:
        """The inverse of `to_json`; reads also a plain list of sources, as flam wrote before it verified clips.

        Raises DataError, naming the first field that is wrong.
        """
        try:
            if text.lstrip().startswith(b"["):
                return Quarantine(sources=_SOURCES.validate_json(text))
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(f"quarantine: {where}: {first['msg']}", fix=_FIX_READ) from error

    @cached_property
    def _rows(self) -> Mapping[str, set[int | None]]:
        """Entries by shard: a plan asks for thousands of shards."""
        rows: dict[str, set[int | None]] = {}
        for bad in self.clips:
            rows.setdefault(bad.shard, set()).add(bad.row)
        return rows


_ADAPTER = TypeAdapter(Quarantine)
_SOURCES = TypeAdapter(tuple[BadSource, ...])


def check_share(max_bad_share: float) -> None:
    """Raise SettingsError unless it is a share, 0 to 1."""
    if not 0.0 <= max_bad_share <= 1.0:
        raise SettingsError(f"max_bad_share = {max_bad_share}", fix="Choose a share from 0 to 1, such as 0.01.")


def read_quarantine(fs: FileSystem, path: str) -> Quarantine:
    """The quarantine of the data set at `path`; an empty one if it has no such file.

    Raises DataError if the file is broken, EnvironmentFault if the storage does not answer.
    """
    where = f"{path}/{QUARANTINE_NAME}"
    try:
        with fs.open_input_stream(where) as stream:
            text = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return Quarantine()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {where}: {one_line(error)}", fix=_FIX_STORAGE) from error
    try:
        return Quarantine.from_json(text)
    except DataError as error:
        raise DataError(f"{where}: {error.what}", fix=error.fix) from error


def write_quarantine(fs: FileSystem, path: str, quarantine: Quarantine) -> None:
    """Write it for the data set at `path`, whole or not at all. Raises EnvironmentFault if the storage refuses."""
    where = f"{path}/{QUARANTINE_NAME}"
    # On a disk a file is there before it is whole; an object appears when its upload is complete.
    target = f"{path}/.{QUARANTINE_NAME}.part" if fs.type_name == "local" else where
    try:
        with fs.open_output_stream(target) as stream:
            stream.write(quarantine.to_json())
        if target != where:
            fs.move(target, where)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {where}: {one_line(error)}", fix=_FIX_STORAGE) from error


def _row_key(row: int | None) -> int:
    """Sorts a whole shard before its rows."""
    return -1 if row is None else row
