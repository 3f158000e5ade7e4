"""Makes a data set of a source: cuts episodes into clips, assigns splits, writes shards, and last the manifest.

Until the manifest is there, there is no data set: shards are written below `.incoming/`, renamed when all of them are
whole, and the manifest follows. A failed ingest deletes what it wrote; one that was killed leaves files below
`.incoming/`, which the next one that succeeds clears away. Equal source, options and seed give equal bytes.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from flam_core.data.codec import Codec, get_codec
from flam_core.data.manifest import (
    MANIFEST_NAME,
    NAME_PATTERN,
    QUARANTINE_NAME,
    SPLITS,
    Manifest,
    one_line,
    read_manifest,
    write_manifest,
)
from flam_core.data.shard import SCHEMA, ShardWriter, WrittenShard, encode_clip
from flam_core.data.sources import FolderSource, Recording, Source, WorldSource
from flam_core.data.videos import BadVideo, VideoOptions
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from flam_core.worlds.base import World

Progress = Callable[[int, int | None], None]
"""Called after each clip with the frames read so far, and all there will be at most, if known."""

_INCOMING = ".incoming"
_SPOOL_BYTES = 64 << 20  # encoded clips of one episode held in memory; more of them wait on the local disk
_REASONS_SHOWN = 20


@dataclass(frozen=True)
class IngestOptions:
    """How clips are cut and stored."""

    clip_frames: int | None = None
    """Frames of a clip; None takes 128 for frames up to 96 pixels and 64 above."""
    min_clip_frames: int = 16
    """The end of an episode that is shorter than this is dropped and counted; otherwise it is a clip of its own."""
    codec: str = "zstd"
    shard_bytes: int = 128 << 20
    """A shard ends before it would be larger."""
    row_group_bytes: int = 8 << 20
    """A row group, the unit of reading, ends before it would be larger."""
    row_group_clips: int = 64
    """Or when it has this many clips, so that small data sets too have several to shuffle."""
    overwrite: bool = False
    """Replace an existing data set of different content."""

    def __post_init__(self) -> None:
        if self.min_clip_frames < 2:
            raise SettingsError(f"ingest: min_clip_frames = {self.min_clip_frames}", fix="Choose 2 or more.")
        if self.clip_frames is not None and self.clip_frames < self.min_clip_frames:
            raise SettingsError(
                f"ingest: clip_frames {self.clip_frames} is below min_clip_frames {self.min_clip_frames}",
                fix="Lower min_clip_frames or raise clip_frames.",
            )
        for name in ("shard_bytes", "row_group_bytes", "row_group_clips"):
            if getattr(self, name) < 1:
                raise SettingsError(f"ingest: {name} = {getattr(self, name)}", fix="Choose 1 or more.")
        get_codec(self.codec)


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did."""

    manifest: Manifest
    seconds: float
    bad: tuple[BadVideo, ...]
    """Files and episodes left out, as in `quarantine.json`; paths are relative to the source."""
    dropped_frames: int
    """Frames read but not stored, since too few were left for a clip. Those of damaged files are not counted."""

    @property
    def clips(self) -> int:
        return self.manifest.clips

    @property
    def frames(self) -> int:
        return self.manifest.frames

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return self.manifest.total_bytes

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds


def ingest_world(
    world: World,
    fs: FileSystem,
    path: str,
    *,
    episodes: int,
    frames: int,
    seed: int = 0,
    name: str | None = None,
    options: IngestOptions = IngestOptions(),
    on_progress: Progress | None = None,
) -> IngestReport:
    """Record `episodes` episodes of at most `frames` frames and store them. Raises as `ingest` does."""
    source = WorldSource(world, episodes, frames, seed)
    return ingest(source, fs, path, seed=seed, name=name, options=options, on_progress=on_progress)


def ingest_folder(
    folder: Path,
    fs: FileSystem,
    path: str,
    *,
    video: VideoOptions = VideoOptions(),
    licence: str = "unknown",
    seed: int = 0,
    name: str | None = None,
    options: IngestOptions = IngestOptions(),
    on_progress: Progress | None = None,
) -> IngestReport:
    """Decode every video file below `folder` and store it, one episode each. Raises as `ingest` does."""
    source = FolderSource(folder, video, licence)
    return ingest(source, fs, path, seed=seed, name=name, options=options, on_progress=on_progress)


def ingest(
    source: Source,
    fs: FileSystem,
    path: str,
    *,
    seed: int = 0,
    name: str | None = None,
    options: IngestOptions = IngestOptions(),
    on_progress: Progress | None = None,
) -> IngestReport:
    """Store all of `source` as the data set at `path` on `fs`; `seed` decides the splits, 80/10/10 by episode.

    `name` is that of the data set; by default that of the source. Raises DataError if nothing can be used, if fewer
    than three episodes can, or if another data set is in the way; SettingsError for a bad name; EnvironmentFault if
    the storage does not take it. In all these cases `path` is left as it was.
    """
    started = time.perf_counter()
    root = path.rstrip("/")
    plan = _Plan.of(source, seed, name, options)
    previous = _in_the_way(fs, root, plan, options)
    staging = f"{root}/{_INCOMING}/{uuid.uuid4().hex}"
    sizes = {key: getattr(options, key) for key in ("shard_bytes", "row_group_bytes", "row_group_clips")}
    writers = {split: ShardWriter(fs, staging, split, **sizes) for split in SPLITS}
    tally = _Tally(on_progress, source.frames)
    placed: list[str] = []
    made = [] if fs.type_name == "s3" else _absent(fs, root)
    try:
        if fs.type_name != "s3":  # a bucket has no folders to make
            fs.create_dir(staging)
            fs.create_dir(f"{root}/shards")
        _write_clips(source, plan, options, writers, tally)
        written = [shard for split in SPLITS for shard in writers[split].close()]
        manifest = _manifest(plan, tally, written)
        if previous is not None and previous.sha256 != manifest.sha256 and not options.overwrite:
            raise _different(root)
        for shard in written:
            fs.move(shard.path, f"{root}/{shard.shard.name}")
            placed.append(shard.shard.name)
        with fs.open_output_stream(f"{root}/{QUARANTINE_NAME}") as stream:
            stream.write(json.dumps([asdict(bad) for bad in tally.bad], indent=1).encode() + b"\n")
        write_manifest(fs, root, manifest)
    except BaseException as error:  # also on Ctrl-C
        for writer in writers.values():
            writer.abort()
        _take_back(fs, root, staging, placed, previous, made)
        if isinstance(error, OSError):
            raise EnvironmentFault(
                f"cannot write the data set at {root}: {one_line(error)}", fix="Check storage, access and free space."
            ) from error
        raise
    _clear(fs, root, manifest, previous)
    return IngestReport(manifest, time.perf_counter() - started, tuple(tally.bad), tally.dropped_frames)


@dataclass(frozen=True)
class _Plan:
    """What an ingest will do, known before it starts; the part of a manifest that must agree with an existing one."""

    name: str
    source: str
    licence: str
    settings: dict[str, str | int | float | bool | None]
    frame_size: tuple[int, int]
    clip_frames: int
    seed: int

    @staticmethod
    def of(source: Source, seed: int, name: str | None, options: IngestOptions) -> _Plan:
        if name is None:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).lstrip("._-") or "data"
        if not NAME_PATTERN.fullmatch(name):
            raise SettingsError(
                f"data set name {name!r}",
                fix="Use letters, digits, '.', '_' and '-', and begin with a letter or digit.",
            )
        if source.episodes is not None:
            _check_enough(source.episodes, [])
        clip_frames = options.clip_frames or (128 if max(source.frame_size) <= 96 else 64)
        if clip_frames < options.min_clip_frames:
            raise SettingsError(
                f"ingest: min_clip_frames {options.min_clip_frames} is above the clip length {clip_frames}",
                fix="Lower it or set clip_frames.",
            )
        settings = {key: value for key, value in asdict(options).items() if key != "overwrite"}
        settings |= {"clip_frames": clip_frames, "seed": seed, **source.settings}
        return _Plan(name, source.description, source.licence, settings, source.frame_size, clip_frames, seed)


@dataclass
class _Tally:
    """What was read so far."""

    on_progress: Progress | None
    frames_expected: int | None
    frames_read: int = 0
    dropped_frames: int = 0
    episodes: Counter[str] = field(default_factory=Counter)
    bad: list[BadVideo] = field(default_factory=list)
    rates: set[float] = field(default_factory=set)
    has_truth: bool = True

    def read(self, frames: int) -> None:
        self.frames_read += frames
        if self.on_progress is not None:
            self.on_progress(self.frames_read, self.frames_expected)


def split_labels(episodes: int | None, seed: int) -> Iterator[str]:
    """Yield the split of each usable episode in turn, for ever: 80 % train, 10 % val, 10 % test.

    With a known number of episodes the shares are exact (val and test: a tenth each, rounded, at least one);
    otherwise every ten in a row are divided 8/1/1. The first three episodes always have one of each.
    """
    size = episodes or 10
    part = max(1, round(size / 10))
    block = ["train"] * (size - 2 * part) + ["val"] * part + ["test"] * part
    rng = np.random.default_rng(seed)
    head = [SPLITS[i] for i in rng.permutation(3)]
    rest = block.copy()
    for split in head:
        rest.remove(split)
    yield from head
    yield from (rest[i] for i in rng.permutation(len(rest)))
    while True:
        yield from (block[i] for i in rng.permutation(size))


def _write_clips(
    source: Source, plan: _Plan, options: IngestOptions, writers: dict[str, ShardWriter], tally: _Tally
) -> None:
    """Read every recording and give the rows of the good ones to the writer of their split."""
    labels = split_labels(source.episodes, plan.seed)
    codec = get_codec(options.codec)
    for recording in source.recordings(plan.clip_frames):
        # A file may turn out to be damaged at its end, so its rows wait here until it was read to the end.
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            with pa.ipc.new_stream(spool, SCHEMA) as rows:
                bad = _encode(recording, plan, options.min_clip_frames, codec, rows, tally)
            if bad is not None:
                tally.bad.append(bad)
                continue
            split = next(labels)
            tally.episodes[split] += 1
            spool.seek(0)
            for row in pa.ipc.open_stream(spool):
                writers[split].write(row)
    _check_enough(tally.episodes.total(), tally.bad)


def _encode(
    recording: Recording, plan: _Plan, shortest: int, codec: Codec, rows: pa.RecordBatchStreamWriter, tally: _Tally
) -> BadVideo | None:
    """Write the rows of one episode; why it cannot be used, if it cannot."""
    length = kept = 0
    for clip in recording.clips:
        if isinstance(clip, BadVideo):
            return clip
        if clip.frames.shape[1:3] != plan.frame_size:
            raise DataError(f"clip {clip.id}: frames of {clip.frames.shape[1:3]}, the source says {plan.frame_size}")
        length += len(clip.frames)
        tally.read(len(clip.frames))
        if len(clip.frames) < shortest:
            continue  # the end of the episode
        rows.write_batch(encode_clip(clip, codec))
        kept += len(clip.frames)
        tally.rates.add(clip.fps)
        tally.has_truth &= clip.truth is not None
    tally.dropped_frames += length - kept
    if kept:
        return None
    return BadVideo(recording.episode, f"{length} frame{'s' * (length != 1)}: too short for a clip of {shortest}")


def _check_enough(episodes: int, bad: list[BadVideo]) -> None:
    """Raise DataError unless each split gets an episode."""
    if episodes >= len(SPLITS):
        return
    reasons = [f"{entry.path}: {entry.reason}" for entry in bad[:_REASONS_SHOWN]]
    if len(bad) > _REASONS_SHOWN:
        reasons.append(f"and {len(bad) - _REASONS_SHOWN} more")
    left_out = f"; left out: {'; '.join(reasons)}" if reasons else ""
    usable = f"{episodes} usable episode{'s' * (episodes != 1)}"
    raise DataError(
        f"{usable}, but a data set needs 3: one each for train, val and test{left_out}",
        fix="Give more episodes: a long recording can be cut into several files.",
    )


def _manifest(plan: _Plan, tally: _Tally, written: list[WrittenShard]) -> Manifest:
    shards = tuple(entry.shard for entry in written)
    return Manifest(
        name=plan.name,
        source=plan.source,
        licence=plan.licence,
        settings=plan.settings,
        frame_size=plan.frame_size,
        fps=next(iter(tally.rates)) if len(tally.rates) == 1 else None,
        has_truth=tally.has_truth,
        episodes={split: tally.episodes[split] for split in SPLITS},
        clips=sum(shard.clips for shard in shards),
        frames=sum(shard.frames for shard in shards),
        shards=shards,
    )


def _in_the_way(fs: FileSystem, root: str, plan: _Plan, options: IngestOptions) -> Manifest | None:
    """The manifest that is there already. Raises DataError at once if it is of something else and must be kept."""
    try:
        if fs.get_file_info(f"{root}/{MANIFEST_NAME}").type == FileType.NotFound:
            return None
        previous = read_manifest(fs, root)
    except OSError as error:
        raise EnvironmentFault(f"cannot look at {root}: {one_line(error)}", fix="Check storage and access.") from error
    except DataError:
        if options.overwrite:
            return None
        raise
    same = (previous.name, previous.source, dict(previous.settings)) == (plan.name, plan.source, plan.settings)
    if not same and not options.overwrite:
        raise _different(root)
    return previous


def _different(root: str) -> DataError:
    return DataError(f"another data set is at {root}", fix="Choose another place, or overwrite it.")


def _absent(fs: FileSystem, root: str) -> list[str]:
    """The folders above `root` that are not there yet, the deepest first."""
    folders = [str(folder) for folder in PurePosixPath(root).parents]
    try:
        return [folder for folder in folders if fs.get_file_info(folder).type == FileType.NotFound]
    except OSError:
        return []  # making them will say what is wrong


def _take_back(
    fs: FileSystem, root: str, staging: str, placed: list[str], previous: Manifest | None, made: list[str]
) -> None:
    """Delete what a failed ingest left, but nothing of a data set that was there, nor of another ingest.

    What cannot be deleted is left: the error that came first is the one to report.
    """
    kept = set() if previous is None else {shard.name for shard in previous.shards}
    gone = [name for name in placed if name not in kept] + ([QUARANTINE_NAME] if previous is None else [])
    for name in gone:
        with suppress(OSError):
            fs.delete_file(f"{root}/{name}")
    with suppress(OSError):
        fs.delete_dir(staging)
    for folder in (f"{root}/{_INCOMING}", f"{root}/shards", root, *made):
        with suppress(OSError):
            if not fs.get_file_info(FileSelector(folder)):
                fs.delete_dir(folder)


def _clear(fs: FileSystem, root: str, manifest: Manifest, previous: Manifest | None) -> None:
    """Delete what the new data set does not need. What cannot be deleted is only in the way, so it is left."""
    names = {shard.name for shard in manifest.shards}
    for shard in previous.shards if previous is not None else ():
        if shard.name not in names:
            with suppress(OSError):
                fs.delete_file(f"{root}/{shard.name}")
    with suppress(OSError):
        fs.delete_dir(f"{root}/{_INCOMING}")
