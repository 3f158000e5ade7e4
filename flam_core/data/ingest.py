"""Makes a data set of a source: cuts episodes into clips, assigns splits, writes shards, and last the manifest.

Until the manifest is there, there is no data set: shards are written below `.incoming/`, renamed when all of them are
whole, and the manifest follows (see `publish`). Equal source, options and seed give equal bytes.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem

from flam_core.data.codec import STORED_CODECS, Codec, Zstd, get_codec
from flam_core.data.codec_choice import CodecChoice, choose_codec
from flam_core.data.manifest import NAME_PATTERN, SPLITS, Manifest, one_line
from flam_core.data.publish import Publication, another, in_the_way
from flam_core.data.shard import SCHEMA, Clip, ShardWriter, WrittenShard, encode_clip
from flam_core.data.sources import FolderSource, Recording, Source, WorldSource
from flam_core.data.videos import BadVideo, VideoOptions
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from flam_core.worlds.base import World

Progress = Callable[[int, int | None], None]
"""Called after each clip with the frames read so far, and all there will be at most, if known."""

_SPOOL_BYTES = 64 << 20  # encoded clips of one episode held in memory; more of them wait on the local disk
_SAMPLE_CLIPS = 8
_SAMPLE_BYTES = 64 << 20  # pixels; a first clip that is larger is the whole sample
_HELD_BYTES = 256 << 20  # pixels read ahead for the sample and held, since a source need not be able to go back
_REASONS_SHOWN = 20


@dataclass(frozen=True)
class IngestOptions:
    """How clips are cut and stored."""

    clip_frames: int | None = None
    """Frames of a clip; None takes 128 for frames up to 96 pixels and 64 above."""
    min_clip_frames: int = 16
    """The end of an episode that is shorter than this is dropped and counted; otherwise it is a clip of its own."""
    codec: Literal["auto", "zstd", "h264", "h264-444", "jpeg"] = "auto"
    """How clips are coded. auto measures all of them on the first clips; zstd alone is lossless."""
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
        if self.codec not in ("auto", *STORED_CODECS):
            raise SettingsError(
                f"ingest: codec = {self.codec!r}", fix=f"Choose auto or one of {', '.join(STORED_CODECS)}."
            )


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did."""

    manifest: Manifest
    seconds: float
    bad: tuple[BadVideo, ...]
    """Files and episodes left out, as in `quarantine.json`; paths are relative to the source."""
    dropped_frames: int
    """Frames read but not stored, since too few were left for a clip. Those of damaged files are not counted."""
    codec_choice: CodecChoice | None
    """What was measured and chosen; None if the options name the codec."""

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
    previous = in_the_way(
        fs, root, name=plan.name, source=plan.source, settings=plan.settings, overwrite=options.overwrite
    )
    place = Publication(fs, root, previous)
    sizes = {key: getattr(options, key) for key in ("shard_bytes", "row_group_bytes", "row_group_clips")}
    writers = {split: ShardWriter(fs, place.staging, split, **sizes) for split in SPLITS}
    tally = _Tally(on_progress, source.frames)
    try:
        place.prepare()
        recordings, codec, choice = _with_codec(source, plan, options)
        _write_clips(recordings, codec, split_labels(source.episodes, seed), plan, options, writers, tally)
        written = [shard for split in SPLITS for shard in writers[split].close()]
        manifest = _manifest(plan, codec, tally, written)
        if previous is not None and previous.sha256 != manifest.sha256 and not options.overwrite:
            raise another(root)
        place.publish(manifest, written, tally.bad)
    except BaseException as error:  # also on Ctrl-C
        for writer in writers.values():
            writer.abort()
        place.take_back()
        if isinstance(error, OSError):
            raise EnvironmentFault(
                f"cannot write the data set at {root}: {one_line(error)}", fix="Check storage, access and free space."
            ) from error
        raise
    place.clear(manifest)
    return IngestReport(manifest, time.perf_counter() - started, tuple(tally.bad), tally.dropped_frames, choice)


@dataclass(frozen=True)
class _Plan:
    """What an ingest will do, known before it starts; the part of a manifest that must agree with an existing one."""

    name: str
    source: str
    licence: str
    settings: dict[str, str | int | float | bool | None]
    frame_size: tuple[int, int]
    clip_frames: int

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
        return _Plan(name, source.description, source.licence, settings, source.frame_size, clip_frames)


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


def _with_codec(
    source: Source, plan: _Plan, options: IngestOptions
) -> tuple[Iterator[Recording], Codec, CodecChoice | None]:
    """All recordings, the codec for them, and how it was chosen if the options leave that to be measured."""
    recordings = source.recordings(plan.clip_frames)
    if options.codec != "auto":
        return recordings, get_codec(options.codec), None
    sample, recordings = _sampled(recordings, options.min_clip_frames)
    if not sample:  # no clip will be stored: the end of the reading says why
        return recordings, Zstd(), None
    choice = choose_codec(sample)
    return recordings, get_codec(choice.codec), choice


def _sampled(recordings: Iterator[Recording], shortest: int) -> tuple[list[np.ndarray], Iterator[Recording]]:
    """Clips of the first recordings, the first of each if memory lets so many be read ahead; and all recordings."""
    begun: list[Recording] = []
    usable: list[list[np.ndarray]] = []
    held = 0
    for recording in recordings:
        clips: list[Clip | BadVideo] = []
        begun.append(replace(recording, clips=chain(clips, recording.clips)))
        for clip in recording.clips:  # to its end: the next recording may follow it in one file
            clips.append(clip)
            held += clip.frames.nbytes if isinstance(clip, Clip) else 0
            if held >= _HELD_BYTES:
                break
        good = [clip.frames for clip in clips if isinstance(clip, Clip) and len(clip.frames) >= shortest]
        if good and not isinstance(clips[-1], BadVideo):
            usable.append(good)
        if len(usable) == _SAMPLE_CLIPS or held >= _HELD_BYTES:
            break
    in_turn = [frames for clips in zip_longest(*usable) for frames in clips if frames is not None]
    sizes = accumulate(frames.nbytes for frames in in_turn)
    fit = sum(size <= _SAMPLE_BYTES for size in sizes)
    return in_turn[: min(_SAMPLE_CLIPS, max(1, fit))], chain(begun, recordings)


def _write_clips(
    recordings: Iterator[Recording],
    codec: Codec,
    labels: Iterator[str],
    plan: _Plan,
    options: IngestOptions,
    writers: dict[str, ShardWriter],
    tally: _Tally,
) -> None:
    """Read every recording and give the rows of the good ones to the writer of their split."""
    for recording in recordings:
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
        truth = clip.truth
        tally.has_truth &= truth is not None and truth.actions is not None and truth.positions is not None
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


def _manifest(plan: _Plan, codec: Codec, tally: _Tally, written: list[WrittenShard]) -> Manifest:
    shards = tuple(entry.shard for entry in written)
    return Manifest(
        name=plan.name,
        source=plan.source,
        licence=plan.licence,
        settings=plan.settings,
        codec=codec.name,
        frame_size=plan.frame_size,
        fps=next(iter(tally.rates)) if len(tally.rates) == 1 else None,
        has_truth=tally.has_truth,
        episodes={split: tally.episodes[split] for split in SPLITS},
        clips=sum(shard.clips for shard in shards),
        frames=sum(shard.frames for shard in shards),
        shards=shards,
    )
