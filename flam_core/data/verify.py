"""Verifying a data set: every shard is read once, every clip is checked and decoded; what is broken is quarantined.

What to leave out is decided by how far the damage can be told apart:

- a shard that is missing, has another size, or whose footer does not fit the manifest is left out whole;
- a row group that cannot be read is left out, row by row;
- a clip whose payload, shape or ground truth is wrong is left out alone, its neighbours stay: each has a checksum;
- a shard whose sha256 differs while every clip is right is left out whole, since nobody knows what has changed.

A storage that does not answer says nothing about the data, so it is an error and never a reason to leave out clips.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from flam_core.data.manifest import Manifest, Shard, one_line, read_manifest
from flam_core.data.quarantine import BadClip, Quarantine, read_quarantine
from flam_core.data.shard import SCHEMA, decode_clip
from flam_core.errors import DataError, EnvironmentFault, SettingsError

Progress = Callable[[int, int | None], None]
"""Called with the frames checked so far, and all there are. Comes from any thread, but from one at a time."""

_WINDOW_BYTES = 8 << 20  # as large as a row group: few requests to a bucket, little memory
_TRUTH_LISTS = ("actions", "positions", "rewards")
_REASON_LENGTH = 200
_CHANGED = "the file has changed, its sha256 is not the manifest's"
# What pyarrow raises on bytes that are not what was written: its own errors and those of Python they derive from.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found."""

    manifest: Manifest
    quarantine: Quarantine
    """Bad clips as found now; sources as `quarantine.json` had them."""
    frames: int
    """Frames that were decoded and are right."""
    seconds: float

    @property
    def bad_clips(self) -> int:
        """Clips left out."""
        return self.quarantine.bad_clips(self.manifest)

    @property
    def share(self) -> float:
        """Share of the clips left out, 0 to 1."""
        return self.quarantine.share(self.manifest)

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds


def verify_data(
    fs: FileSystem, path: str, *, workers: int | None = None, on_progress: Progress | None = None
) -> VerifyReport:
    """Read all of the data set at `path` and tell what is broken; nothing is written.

    `workers` shards are read at a time (default: one a CPU), each with a few row groups in memory. Raises DataError
    if manifest or `quarantine.json` are broken, EnvironmentFault if the storage does not answer.
    """
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise SettingsError(f"verify: workers = {workers}", fix="Choose 1 or more.")
    started = time.perf_counter()
    path = path.rstrip("/")
    manifest = read_manifest(fs, path)
    quarantine = read_quarantine(fs, path)
    counter = _Counter(manifest.frames, on_progress)
    bad: list[BadClip] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        shards = [pool.submit(_verify_shard, fs, path, shard, manifest, counter) for shard in manifest.shards]
        try:
            for shard in as_completed(shards):
                bad += shard.result()
        except BaseException:  # also on Ctrl-C: leaving the pool waits for the shards being read
            counter.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    quarantine = replace(quarantine, clips=tuple(bad))
    frames = sum(
        frames
        for shard in manifest.shards
        for row, frames in enumerate(shard.clip_frames)
        if row not in quarantine.rows(shard)
    )
    return VerifyReport(manifest, quarantine, frames, time.perf_counter() - started)


class _Counter:
    """Frames checked so far, of all threads."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.stop = threading.Event()
        self._total, self._on_progress = total, on_progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, frames: int) -> None:
        with self._lock:
            self._done += frames
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)


def _verify_shard(fs: FileSystem, path: str, shard: Shard, manifest: Manifest, counter: _Counter) -> list[BadClip]:
    """What is bad in one shard. Raises EnvironmentFault if the storage fails."""
    where = f"{path}/{shard.name}"
    try:
        with fs.open_input_file(where) as stream:
            file = _ShardFile(stream)
            if file.size == shard.bytes:
                return _ShardCheck(file, shard, manifest, counter).run()
            problem = f"has {file.size} bytes, the manifest says {shard.bytes}"
    except (FileNotFoundError, NotADirectoryError):
        problem = "is missing"
    except OSError as error:
        raise EnvironmentFault(
            f"cannot read shard {where}: {one_line(error)}", fix="Check storage and access; nothing was quarantined."
        ) from error
    counter.add(shard.frames)
    return [_whole(shard, problem)]


class _ShardCheck:
    """Reads one shard from beginning to end."""

    def __init__(self, file: _ShardFile, shard: Shard, manifest: Manifest, counter: _Counter) -> None:
        self._file, self._shard, self._manifest, self._counter = file, shard, manifest, counter
        self._starved: MemoryError | None = None

    def run(self) -> list[BadClip]:
        """What is bad. Raises OSError if the storage fails, EnvironmentFault if memory does."""
        bad = self._clips()
        if self._counter.stop.is_set():
            return []
        changed = self._file.sha256() != self._shard.sha256
        if self._starved is not None and not changed:  # damaged sizes ask for any amount, but these are not damaged
            raise EnvironmentFault(
                f"shard {self._shard.name} does not fit in memory: {one_line(self._starved)}",
                fix="Free memory or use fewer workers.",
            ) from self._starved
        if not changed:
            return bad
        if not bad:
            return [_whole(self._shard, f"{_CHANGED}, yet every clip is right: something else is wrong")]
        return [replace(entry, reason=f"{entry.reason}; {_CHANGED}") for entry in bad]

    def _clips(self) -> list[BadClip]:
        shard = self._shard
        try:
            # Without pre_buffer nothing is fetched behind our back, so that each error comes up where it is caught.
            parquet = pq.ParquetFile(pa.PythonFile(self._file, mode="r"), pre_buffer=False)
            problem = _layout_problem(parquet, shard)
        except (MemoryError, *_DAMAGE) as error:
            return self._unusable(self._damage("its footer", error))
        if problem is not None:
            return self._unusable(problem)
        bad: list[BadClip] = []
        row = 0
        for group, clips in enumerate(shard.row_groups):
            if self._counter.stop.is_set():
                break
            bad += self._row_group(parquet, group, row, clips)
            self._counter.add(sum(shard.clip_frames[row : row + clips]))
            row += clips
        return bad

    def _unusable(self, reason: str) -> list[BadClip]:
        self._counter.add(self._shard.frames)
        return [_whole(self._shard, reason)]

    def _row_group(self, parquet: pq.ParquetFile, group: int, first: int, clips: int) -> list[BadClip]:
        try:
            table = parquet.read_row_group(group, use_threads=False)
            table.validate(full=True)  # offsets and UTF-8 too: the accessors below trust them
            rows = table.drop_columns(list(_TRUTH_LISTS)).to_pylist()
            if len(rows) != clips:
                raise ValueError(f"{len(rows)} rows, the manifest says {clips}")
        except (MemoryError, *_DAMAGE) as error:
            reason = self._damage(f"row group {group}", error)
            return [BadClip(self._shard.name, first + i, None, reason) for i in range(clips)]
        bad = []
        for i, row in enumerate(rows):
            lists = {name: table[name][i].values for name in _TRUTH_LISTS}
            problem = _clip_problem(row, lists, self._shard.clip_frames[first + i], self._manifest)
            if problem is not None:
                bad.append(BadClip(self._shard.name, first + i, _plain(row["id"]), _plain(problem)))
        return bad

    def _damage(self, what: str, error: Exception) -> str:
        """Why `what` cannot be read. Raises OSError if it was the storage that failed, and not the bytes."""
        if self._file.fault is not None:
            raise self._file.fault
        if isinstance(error, MemoryError):
            self._starved = error
        return _plain(f"{what} cannot be read: {one_line(error)}")


def _layout_problem(parquet: pq.ParquetFile, shard: Shard) -> str | None:
    """What in the footer does not fit the manifest."""
    layout = parquet.metadata
    row_groups = tuple(layout.row_group(group).num_rows for group in range(layout.num_row_groups))
    if row_groups != shard.row_groups or layout.num_rows != shard.clips:
        return f"has {layout.num_rows} clips in {len(row_groups)} row groups that are not the manifest's"
    if not parquet.schema_arrow.equals(SCHEMA):
        return "its columns are not those of a shard"
    return None


def _clip_problem(
    row: Mapping[str, Any], lists: Mapping[str, pa.Array | None], frames: int, of: Manifest
) -> str | None:
    """What is wrong with a clip, whose shape is checked before the payload is decoded: it says how much memory."""
    if row["frames"] != frames:
        return f"{row['frames']} frames, the manifest says {frames}"
    if (row["height"], row["width"]) != of.frame_size:
        return f"frames of {row['height']}x{row['width']}, the manifest says {of.frame_size[0]}x{of.frame_size[1]}"
    if not (math.isfinite(row["fps"]) and row["fps"] > 0) or (of.fps is not None and row["fps"] != of.fps):
        return f"{row['fps']} frames a second, the manifest says {of.fps or 'more than 0'}"
    if row["id"] != f"{row['episode']}:{row['start']}" or row["start"] < 0:
        return f"its id is not that of episode {row['episode']}, frame {row['start']}"
    if row["codec"] != of.codec:
        return f"coded as {row['codec']!r}, the manifest says {of.codec!r}"
    try:
        pixels = decode_clip(row, "")
    except DataError as error:
        return error.what.removeprefix(f"shard , clip {row['id']}: ")
    if pixels.dtype != "uint8" or pixels.shape != (frames, *of.frame_size, 3):
        return f"decodes to {pixels.dtype} {pixels.shape}"
    return _truth_problem(row, lists, of.has_truth)


def _truth_problem(row: Mapping[str, Any], lists: Mapping[str, pa.Array | None], expected: bool) -> str | None:
    """Actions, positions and rewards may each be missing, but the first two only if they are not `expected`."""
    frames, entities, action_size = row["frames"], row["entities"], row["action_size"]
    if expected and lists["actions"] is None:
        return "has no ground truth, the manifest says it has"
    if lists["actions"] is None and lists["positions"] is None:
        found = {"entities": entities, "action_size": action_size}
        stray = [name for name, value in found.items() if value is not None]
        if stray:
            return f"has {', '.join(stray)} but no actions"
    elif entities is None or entities < 0 or (lists["actions"] is None) != (action_size is None):
        return f"ground truth of {entities} entities with actions of {action_size}"
    per_frame = {"actions": (entities or 0) * (action_size or 0), "positions": (entities or 0) * 2, "rewards": 1}
    for name, numbers in per_frame.items():
        values, size = lists[name], frames * numbers
        if values is None and not (expected and name == "positions"):
            continue
        if values is None or len(values) != size or values.null_count:
            found = "none" if values is None else f"{len(values) - values.null_count}"
            return f"{name}: {found} values, {frames} frames of {entities} entities have {size}"
    return None


class _ShardFile(io.RawIOBase):
    """A shard as Parquet reads it: mostly forward, so bytes are hashed as they pass and none is fetched twice.

    Parquet's errors on damaged bytes are of the same kind as those of a storage; `fault` tells them apart.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self.size: int = file.size()
        self.fault: OSError | None = None
        self._file = file
        self._at = 0
        self._window = b""
        self._window_at = 0
        self._digest = hashlib.sha256()
        self._hashed = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if self._at < 0:
            raise ValueError(f"position {self._at}")
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at
        end = self.size if size < 0 else min(start + size, self.size)
        if start >= end:
            return b""
        if start < self._window_at or end > self._window_at + len(self._window):
            self._move_window(start, end)
        self._at = end
        return self._window[start - self._window_at : end - self._window_at]

    def sha256(self) -> str:
        """Of the whole file, reading what Parquet has not asked for. Raises OSError if the storage fails."""
        while self._hashed < self.size:
            self._fetch(self._hashed, self._hashed + _WINDOW_BYTES)
        return self._digest.hexdigest()

    def _move_window(self, start: int, end: int) -> None:
        """Let the window hold [start, end), and what follows if there is room."""
        kept = self._window[start - self._window_at :] if start >= self._window_at else b""
        if not kept and self._hashed < start <= self._hashed + _WINDOW_BYTES:
            start = self._hashed  # the few bytes that Parquet skips, such as those between columns
        begin = start + len(kept)
        self._window = kept + self._fetch(begin, max(end, begin + _WINDOW_BYTES))
        self._window_at = start

    def _fetch(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        try:
            data = self._file.read_at(end - start, start)
            if len(data) != end - start:
                raise OSError(f"it ended at byte {start + len(data)} of {self.size} while it was read")
        except OSError as error:
            self.fault = error
            raise
        if start <= self._hashed < end:
            self._digest.update(memoryview(data)[self._hashed - start :])
            self._hashed = end
        return data


def _whole(shard: Shard, reason: str) -> BadClip:
    return BadClip(shard.name, None, None, reason)


def _plain(text: str) -> str:
    """`text` fit to be printed: what comes from damaged bytes may hold anything."""
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return clean if len(clean) <= _REASON_LENGTH else f"{clean[:_REASON_LENGTH]}..."
