"""Shards: Parquet files with a clip a row, in row groups that are read one at a time by range requests.

The payload column is neither compressed nor dictionary-coded by Parquet: it is compressed already. The truth columns
are, and cost nothing to a reader that does not ask for them.
"""

from __future__ import annotations

import hashlib
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FileType

from flam_core.data.codec import Codec, get_codec
from flam_core.data.manifest import Shard, one_line
from flam_core.errors import DataError, EnvironmentFault

_FRAME_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("episode", pa.string(), nullable=False),
    pa.field("start", pa.int64(), nullable=False),  # index in the episode of the clip's first frame
    pa.field("frames", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("fps", pa.float64(), nullable=False),
    pa.field("codec", pa.string(), nullable=False),
    pa.field("crc32", pa.int64(), nullable=False),  # of the payload
    pa.field("payload", pa.large_binary(), nullable=False),
]
_TRUTH_FIELDS = [
    pa.field("entities", pa.int32()),
    pa.field("action_size", pa.int32()),
    pa.field("actions", pa.list_(pa.float32())),  # [frames, entities, action_size], flat
    pa.field("positions", pa.list_(pa.float32())),  # [frames, entities, 2], flat
    pa.field("rewards", pa.list_(pa.float32())),  # [frames]
]
SCHEMA = pa.schema(_FRAME_FIELDS + _TRUTH_FIELDS)
FRAME_COLUMNS = tuple(field.name for field in _FRAME_FIELDS)
"""Enough for `decode_clip`."""
TRUTH_COLUMNS = ("id", "frames", *(field.name for field in _TRUTH_FIELDS))
"""Enough for `decode_truth`."""
ACTION_COLUMNS = ("entities", "action_size", "actions")
"""With `FRAME_COLUMNS`, enough for `decode_actions`."""

_READ_BYTES = 8 << 20
_FIX = "Restore the shard or ingest again."
_FIX_STORAGE = "Check storage and access."
_FIX_ACTIONS = "Ingest the data with ground truth: actions of every episode (docs/data.md)."


@dataclass(frozen=True)
class Truth:
    """Ground truth of a clip: as in `worlds.base.Episode`, all float32. None is not known for any frame."""

    actions: np.ndarray | None = None
    """[T, N, A]"""
    positions: np.ndarray | None = None
    """[T, N, 2]"""
    rewards: np.ndarray | None = None
    """[T]"""

    @property
    def entities(self) -> int | None:
        """N; None if neither actions nor positions say it."""
        known = self.actions if self.actions is not None else self.positions
        return known.shape[1] if known is not None and known.ndim > 1 else None


@dataclass(frozen=True)
class Clip:
    """A run of frames of one episode. Raises DataError if shapes or types are not as said here."""

    episode: str
    start: int
    """Index in the episode of the first frame."""
    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB."""
    fps: float
    truth: Truth | None = None

    @property
    def id(self) -> str:
        """Unique in a data set."""
        return f"{self.episode}:{self.start}"

    def __post_init__(self) -> None:
        length = len(self.frames)
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3 or not length:
            raise DataError(
                f"clip {self.id}: frames are {self.frames.dtype} {self.frames.shape}, not uint8 [T, H, W, 3]"
            )
        if self.truth is None:
            return
        truth, entities = self.truth, self.truth.entities
        actions, positions, rewards = truth.actions, truth.positions, truth.rewards
        if (
            (actions is not None and (actions.ndim != 3 or actions.shape[:2] != (length, entities)))
            or (positions is not None and positions.shape != (length, entities, 2))
            or (rewards is not None and rewards.shape != (length,))
        ):
            raise DataError(
                f"clip {self.id}: {length} frames, but actions {_shape(actions)}, positions {_shape(positions)}, "
                f"rewards {_shape(rewards)}",
                fix="They must be [T, N, A], [T, N, 2] and [T].",
            )


def _shape(array: np.ndarray | None) -> tuple[int, ...] | None:
    return None if array is None else array.shape


def encode_clip(clip: Clip, codec: Codec) -> pa.RecordBatch:
    """The row of a clip: a batch of `SCHEMA` with one row."""
    payload = codec.encode(clip.frames)
    length, height, width, _ = clip.frames.shape
    row: dict[str, Any] = {
        "id": clip.id,
        "episode": clip.episode,
        "start": clip.start,
        "frames": length,
        "height": height,
        "width": width,
        "fps": clip.fps,
        "codec": codec.name,
        "crc32": zlib.crc32(payload),
        "payload": payload,
    }
    if clip.truth is not None:
        row["entities"] = clip.truth.entities
        row["action_size"] = None if clip.truth.actions is None else clip.truth.actions.shape[2]
        for name in ("actions", "positions", "rewards"):
            found = getattr(clip.truth, name)
            row[name] = None if found is None else found.astype(np.float32).ravel()
    return pa.record_batch([pa.array([row.get(field.name)], type=field.type) for field in SCHEMA], schema=SCHEMA)


def decode_clip(row: Mapping[str, Any], shard: str) -> np.ndarray:
    """The frames of a row that has `FRAME_COLUMNS` (as `Table.to_pylist` gives it): read-only uint8 [T, H, W, 3].

    Raises DataError, naming `shard` and the clip, if the payload is not what was written.
    """
    payload = row["payload"]
    where = f"shard {shard}, clip {row['id']}"
    if zlib.crc32(payload) != row["crc32"]:
        raise DataError(f"{where}: the payload is damaged (crc32 differs)", fix=_FIX)
    try:
        return get_codec(row["codec"]).decode(payload, row["frames"], row["height"], row["width"])
    except DataError as error:
        raise DataError(f"{where}: {error.what}", fix=error.fix) from error


def decode_truth(row: Mapping[str, Any]) -> Truth | None:
    """The ground truth of a row that has `TRUTH_COLUMNS`; None where the clip has none."""
    length, entities = row["frames"], row["entities"]
    shapes = {
        "actions": (length, entities, row["action_size"]),
        "positions": (length, entities, 2),
        "rewards": (length,),
    }
    known = {
        name: np.asarray(row[name], dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
        if row[name] is not None
    }
    return Truth(**known) if known else None


def decode_actions(row: Mapping[str, Any], shard: str) -> np.ndarray:
    """The actions of a row that has `FRAME_COLUMNS` and `ACTION_COLUMNS`: float32 [T, N, A], NaN where not known.

    `row["actions"]` is flat: a list, or float32, of which this is then a view. Raises DataError, naming `shard` and the
    clip, if the row has none.
    """
    where = f"shard {shard}, clip {row['id']}"
    if row["actions"] is None or row["entities"] is None or row["action_size"] is None:
        raise DataError(f"{where}: it has no actions", fix=_FIX_ACTIONS)
    actions = np.asarray(row["actions"], dtype=np.float32)
    shape = row["frames"], row["entities"], row["action_size"]
    if actions.size != math.prod(shape):
        raise DataError(f"{where}: {actions.size} numbers are not actions of shape {shape}", fix=_FIX)
    return actions.reshape(shape)


def read_row_group(fs: FileSystem, path: str, row_group: int, columns: Sequence[str] = FRAME_COLUMNS) -> pa.Table:
    """One row group of the shard file at `path`, by range reads of the columns asked for.

    Raises DataError if the file is missing or no shard, EnvironmentFault if the storage does not answer.
    """
    try:
        with fs.open_input_file(path) as file:
            return pq.ParquetFile(file, pre_buffer=True).read_row_group(row_group, columns=list(columns))
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing", fix=_FIX) from error
    except pa.ArrowInvalid as error:
        raise DataError(f"shard {path} is damaged: {one_line(error)}", fix=_FIX) from error
    except OSError as error:
        raise EnvironmentFault(
            f"cannot read shard {path}: {one_line(error)}", fix="Check storage and access."
        ) from error


def verify_shard(fs: FileSystem, path: str, shard: Shard) -> None:
    """Check that a shard of the data set at `path` is there, whole and unchanged, by reading all of it.

    Raises DataError, naming the shard, if not; EnvironmentFault if the storage does not answer.
    """
    where = f"{path}/{shard.name}"
    try:
        info = fs.get_file_info(where)
        if info.type != FileType.File:
            raise DataError(f"shard {where} is missing", fix=_FIX)
        if info.size != shard.bytes:
            raise DataError(f"shard {where} has {info.size} bytes, the manifest says {shard.bytes}", fix=_FIX)
        digest = hashlib.sha256()
        with fs.open_input_stream(where) as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot read shard {where}: {one_line(error)}", fix="Check storage and access."
        ) from error
    if digest.hexdigest() != shard.sha256:
        raise DataError(f"shard {where} has changed: its sha256 is not the manifest's", fix=_FIX)


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard and where it lies until the data set is complete."""

    path: str
    shard: Shard


class ShardWriter:
    """Writes the rows of one split into as many shards as they need.

    A row group is written once the next row would take it over `row_group_bytes`, or at `row_group_clips` rows; a
    shard ends before the row group that would take it over `shard_bytes` (each holds at least one row group). The
    final name of a shard ends with its hash, so new content never takes the name of old.
    """

    def __init__(
        self,
        fs: FileSystem,
        folder: str,
        split: str,
        *,
        shard_bytes: int = 128 << 20,
        row_group_bytes: int = 8 << 20,
        row_group_clips: int = 64,
    ) -> None:
        """Files go to `folder`, which must exist on file systems that have folders."""
        self._fs, self._folder, self._split = fs, folder, split
        self._shard_bytes, self._row_group_bytes, self._row_group_clips = shard_bytes, row_group_bytes, row_group_clips
        self._rows: list[pa.RecordBatch] = []
        self._rows_bytes = 0
        self._open: _OpenShard | None = None
        self._paths: list[str] = []
        self._written: list[WrittenShard] = []

    def write(self, row: pa.RecordBatch) -> None:
        """Add a row made by `encode_clip`. Raises OSError if the storage refuses."""
        if self._rows and self._rows_bytes + row.nbytes > self._row_group_bytes:
            self._flush()
        self._rows.append(row)
        self._rows_bytes += row.nbytes
        if len(self._rows) == self._row_group_clips:
            self._flush()

    def close(self) -> list[WrittenShard]:
        """Finish the last shard; all shards of the split, in order."""
        if self._rows:
            self._flush()
        self._finish()
        return self._written

    def abort(self) -> None:
        """Close and delete all that was written, as far as the storage lets it."""
        if self._open is not None:
            self._open.abandon()
            self._open = None
        for path in self._paths:
            with suppress(OSError):  # the first error is the one to report
                self._fs.delete_file(path)

    def _flush(self) -> None:
        """Write the rows held as one row group."""
        if self._open is not None and self._open.bytes + self._rows_bytes > self._shard_bytes:
            self._finish()
        if self._open is None:
            path = f"{self._folder}/{self._split}-{len(self._paths):05d}.parquet"
            self._paths.append(path)
            self._open = _OpenShard(self._fs, path)
        self._open.write(pa.Table.from_batches(self._rows))
        self._rows, self._rows_bytes = [], 0

    def _finish(self) -> None:
        if self._open is not None:
            self._written.append(self._open.close(f"shards/{self._split}-{len(self._written):05d}", self._split))
            self._open = None


class _OpenShard:
    """A shard being written, and what its manifest entry will say."""

    def __init__(self, fs: FileSystem, path: str) -> None:
        self._path = path
        self._sink = _HashingSink(fs.open_output_stream(path))
        self._parquet = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"),
            SCHEMA,
            compression={f"{name}.list.element": "zstd" for name in ("actions", "positions", "rewards")},  # pyright: ignore[reportArgumentType] - the stub knows no dict
            use_dictionary=False,
            write_statistics=False,
        )
        self._clip_frames: list[int] = []
        self._row_groups: list[int] = []

    @property
    def bytes(self) -> int:
        return self._sink.bytes

    def write(self, rows: pa.Table) -> None:
        self._parquet.write_table(rows, row_group_size=len(rows))
        self._clip_frames += rows["frames"].to_pylist()
        self._row_groups.append(len(rows))

    def close(self, stem: str, split: str) -> WrittenShard:
        self._parquet.close()
        self._sink.close()
        digest = self._sink.digest.hexdigest()
        shard = Shard(
            name=f"{stem}-{digest[:12]}.parquet",
            split=split,
            bytes=self._sink.bytes,
            sha256=digest,
            clips=len(self._clip_frames),
            frames=sum(self._clip_frames),
            clip_frames=tuple(self._clip_frames),
            row_groups=tuple(self._row_groups),
        )
        return WrittenShard(self._path, shard)

    def abandon(self) -> None:
        """Let go of the file without finishing it."""
        self._parquet.is_open = False  # else its destructor writes a footer to the closed sink
        with suppress(OSError):
            self._sink.close()


class _HashingSink(io.RawIOBase):
    """Passes bytes on to a stream, counting and hashing them."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def write(self, data: Any) -> int:  # any buffer, as io.RawIOBase has it
        self._stream.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
