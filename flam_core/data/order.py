"""The sample order: which windows make up global batch n, as a pure function of (manifest, seed, n).

Epochs are unrolled into one endless stream of windows; batch n is the n-th run of `batch` windows of it. World size,
restarts and the transport's order do not enter. The shuffle is bounded, so that reads stay local:

- An epoch is a random order of *sections* (up to 1,024 row groups each, fixed for the run), a section a random order of
  its row groups, and `mix` row groups in a row are a *block*: what is read and held decoded at a time.
- The clips of a block, group after group and shuffled within the group, are cut into `batch` equal *lanes*; a batch
  takes one window of each lane, at random within the lane. So the windows of a batch come from different clips, and a
  rank, which takes neighbouring lanes, needs only its own share of the clips: none is decoded by two ranks but the one
  at a lane's border.

A clip gives windows `stride` frames apart, from a phase drawn anew in each epoch. Memory does not grow with the number
of windows, and any batch is found without looking at another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flam_core.data.manifest import Manifest
from flam_core.data.shuffle import hashed, key, permutation, permuted
from flam_core.errors import DataError, SettingsError

_SECTION_GROUPS = 1024
_BLOCK_BYTES = 256 << 20
_LARGEST_MIX = 16
_BLOCK_BATCHES = 2

# What a key is for; a permutation of one kind must tell nothing about one of another.
_STATIC, _SECTIONS, _GROUPS, _CLIPS, _LANES, _PHASES = range(6)


class ClipKey(NamedTuple):
    """A clip: where it lies."""

    source: int
    """Number of the data set among those of a mixture; 0 for a single one."""
    shard: str
    """Name of the shard, relative to the data set."""
    row_group: int
    row: int
    """Index of the clip in its row group."""


class Window(NamedTuple):
    """A run of frames of one clip: frames start, start + skip, start + 2 skip, ..."""

    clip: ClipKey
    start: int
    """First frame in the clip."""

    @property
    def id(self) -> str:
        """Unique in a data set or mixture."""
        source = f"{self.clip.source}:" if self.clip.source else ""
        return f"{source}{self.clip.shard}/{self.clip.row_group}/{self.clip.row}@{self.start}"


class Block(NamedTuple):
    """A run of the stream whose clips are read together."""

    number: int
    """In the endless stream."""
    start: int
    """Index in the stream of its first window."""
    size: int
    """Windows in it."""
    epoch: int
    groups: tuple[int, ...]
    """Numbers of its row groups, in order."""

    @property
    def end(self) -> int:
        """Index of the first window after it."""
        return self.start + self.size


@dataclass(frozen=True)
class _BlockClips:
    """The clips of a block in their order, those without a window left out. Arrays are int64 [clips]."""

    group: np.ndarray  # number of the row group in the split
    row: np.ndarray  # index in the row group
    phase: np.ndarray  # start of the first window
    before: np.ndarray  # [clips + 1]: windows before each clip
    keys: dict[int, ClipKey] = field(default_factory=dict)  # where they lie, of those that were asked for


@dataclass(frozen=True)
class WindowShape:
    """How windows are cut from clips."""

    frames: int
    """Frames of a window."""
    skip: int = 1
    """Distance of its frames in the clip."""
    stride: int | None = None
    """Distance of the windows of a clip; None puts them end to end, so that no frame is in two."""

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("skip", self.skip), ("stride", self.stride)):
            if value is not None and value < 1:
                raise SettingsError(f"window {name} = {value}", fix="It must be at least 1.")

    @property
    def span(self) -> int:
        """Frames of the clip from the first to the last of a window."""
        return (self.frames - 1) * self.skip + 1

    @property
    def step(self) -> int:
        """Distance of the windows of a clip."""
        return self.stride or self.span

    def windows(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [clips]: windows that fit into clips of those lengths."""
        return np.where(lengths >= self.span, (lengths - self.span) // self.step + 1, 0).astype(np.int64)

    def slack(self, lengths: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """int64 [clips]: the largest phase, for clips that have a window."""
        return lengths - self.span - (windows - 1) * self.step


class SampleOrder:
    """The order of one split of a data set, for global batches of `batch` windows."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        shape: WindowShape,
        batch: int,
        seed: int,
        mix: int | None = None,
        left_out: Mapping[str, Collection[int]] | None = None,
        source: int = 0,
    ) -> None:
        """See the module.

        mix: row groups of a block; by default as many as make 256 MB of frames, at most 16, at least two batches.
        left_out: rows of a shard, by its name, that must not be used (quarantined clips); counted over the whole shard.
        source: number that the windows carry in a mixture.
        Raises DataError if no clip is long enough, or if an epoch has fewer windows than one batch.
        """
        self.shape, self.batch_size, self.seed, self.source = shape, batch, seed, source
        shards = manifest.split(split)
        self._lengths = np.array([n for shard in shards for n in shard.clip_frames], dtype=np.int32)
        _leave_out(self._lengths, shards, left_out or {})
        clips = np.array([n for shard in shards for n in shard.row_groups], dtype=np.int64)
        self._first_clip = np.concatenate([[0], np.cumsum(clips)])  # of each row group
        self._shard_names = [shard.name for shard in shards]
        per_shard = np.array([len(shard.row_groups) for shard in shards], dtype=np.int64)
        self._shard_of = np.repeat(np.arange(len(shards)), per_shard)
        self._index_in_shard = np.arange(len(clips)) - np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
        sizes = np.add.reduceat(shape.windows(self._lengths), self._first_clip[:-1])
        used = np.flatnonzero(sizes)
        self.epoch_windows = int(sizes.sum())
        """Windows of an epoch."""
        _check_enough(manifest, split, shape, batch, self.epoch_windows, int(self._lengths.max(initial=0)))
        self.epoch_frames = int(np.add.reduceat(self._lengths, self._first_clip[:-1], dtype=np.int64)[used].sum())
        """Frames of the row groups of an epoch."""
        self._numbers = used[permutation(key(seed, _STATIC), len(used))]
        self._sizes = sizes[self._numbers]
        if mix is None:
            frames = self.epoch_frames // len(used)
            mix = _mix(frames * manifest.frame_size[0] * manifest.frame_size[1] * 3, self._sizes.mean(), batch)
        self.mix = mix
        self._section_groups = max(1, _SECTION_GROUPS // mix) * mix
        starts = np.arange(0, len(used), self._section_groups)
        self._section_sizes = np.add.reduceat(self._sizes, starts)
        self._section_blocks = -(-np.diff(np.append(starts, len(used))) // mix)
        self.epoch_blocks = int(self._section_blocks.sum())
        """Blocks of an epoch."""

    def batch(self, n: int) -> list[Window]:
        """The windows of global batch n >= 0, in order."""
        return self.windows(n * self.batch_size, (n + 1) * self.batch_size)

    def windows(self, first: int, end: int) -> list[Window]:
        """The windows with numbers first .. end - 1 of the endless stream."""
        return self.windows_at(np.arange(first, end))

    def windows_at(self, indices: np.ndarray) -> list[Window]:
        """The windows with those numbers of the stream, which rise."""
        found: list[Window] = []
        while len(indices):
            block = self.block_at(int(indices[0]))
            until = int(np.searchsorted(indices, block.end))
            clips, starts = self.look_up(block, indices[:until])
            found += map(Window, map(self.clip_key(block), clips.tolist()), starts.tolist())
            indices = indices[until:]
        return found

    def look_up(self, block: Block, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clip and start of the windows with those numbers of the stream, which are in `block`; both int64 [windows].

        A clip is given as its number in the block, which `clip_key` turns into where it lies.
        """
        clips = self._clips(block)
        lane_step, lane = np.divmod(indices - block.start, self.batch_size)
        shortest, longer = divmod(block.size, self.batch_size)
        lane_sizes = shortest + (lane < longer)
        lane_starts = lane * shortest + np.minimum(lane, longer)
        keys = hashed(key(self.seed, block.epoch, _LANES, block.number), lane)
        place = lane_starts + permuted(keys, lane_step, lane_sizes, shortest + 1)
        clip = np.searchsorted(clips.before, place, side="right") - 1
        return clip, clips.phase[clip] + (place - clips.before[clip]) * self.shape.step

    def clip_key(self, block: Block) -> Callable[[int], ClipKey]:
        """Where the clips of a block lie, by their numbers in it."""
        clips = self._clips(block)

        def find(number: int) -> ClipKey:
            found = clips.keys.get(number)
            if found is None:
                group = int(clips.group[number])
                shard = self._shard_names[self._shard_of[group]]
                found = ClipKey(self.source, shard, int(self._index_in_shard[group]), int(clips.row[number]))
                clips.keys[number] = found
            return found

        return find

    def block_at(self, index: int) -> Block:
        """The block that window number `index` of the stream is in."""
        epoch, within = divmod(index, self.epoch_windows)
        _, window_ends, _ = self._epoch(epoch)
        place = int(np.searchsorted(window_ends, within, side="right"))
        before = int(window_ends[place - 1]) if place else 0
        ends = self._section(epoch, place)[1]
        return self._block(epoch, place, int(np.searchsorted(ends, within - before, side="right")))

    def block(self, number: int) -> Block:
        """Block `number` of the stream."""
        epoch, within = divmod(number, self.epoch_blocks)
        _, _, block_ends = self._epoch(epoch)
        place = int(np.searchsorted(block_ends, within, side="right"))
        return self._block(epoch, place, within - (int(block_ends[place - 1]) if place else 0))

    def _block(self, epoch: int, place: int, within: int) -> Block:
        """Block `within` of the section that comes at `place` in the epoch."""
        _, window_ends, block_ends = self._epoch(epoch)
        groups, ends = self._section(epoch, place)
        blocks = len(ends)
        before = int(ends[within - 1]) if within else 0
        members = groups[within * len(groups) // blocks : (within + 1) * len(groups) // blocks]
        return Block(
            number=epoch * self.epoch_blocks + (int(block_ends[place - 1]) if place else 0) + within,
            start=epoch * self.epoch_windows + (int(window_ends[place - 1]) if place else 0) + before,
            size=int(ends[within]) - before,
            epoch=epoch,
            groups=tuple(self._numbers[members].tolist()),
        )

    @lru_cache(maxsize=4)  # noqa: B019 - an order lives as long as its process
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the sections, and the windows and the blocks up to the end of each."""
        order = permutation(key(self.seed, epoch, _SECTIONS), len(self._section_sizes))
        return order, np.cumsum(self._section_sizes[order]), np.cumsum(self._section_blocks[order])

    @lru_cache(maxsize=8)  # noqa: B019 - as above
    def _section(self, epoch: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the groups of a section (indices into `_numbers`), and the windows up to each block's end."""
        section = int(self._epoch(epoch)[0][place])
        first = section * self._section_groups
        size = min(self._section_groups, len(self._numbers) - first)
        groups = first + permutation(key(self.seed, epoch, _GROUPS, section), size)
        blocks = -(-size // self.mix)
        starts = np.arange(blocks) * size // blocks  # blocks of even size, not a small one at the end
        return groups, np.cumsum(np.add.reduceat(self._sizes[groups], starts))

    @lru_cache(maxsize=8)  # noqa: B019 - as above
    def _clips(self, block: Block) -> _BlockClips:
        counts = [int(self._first_clip[g + 1] - self._first_clip[g]) for g in block.groups]
        clips = np.concatenate([np.arange(self._first_clip[g], self._first_clip[g + 1]) for g in block.groups])
        place = np.repeat(np.arange(len(counts)), counts)
        clips = clips[np.lexsort((hashed(key(self.seed, block.epoch, _CLIPS), clips), place))]
        lengths = self._lengths[clips].astype(np.int64)
        windows = self.shape.windows(lengths)
        clips, lengths, windows = clips[windows > 0], lengths[windows > 0], windows[windows > 0]
        slack = self.shape.slack(lengths, windows)
        phase = hashed(key(self.seed, block.epoch, _PHASES), clips) % (slack + 1).astype(np.uint64)
        group = np.searchsorted(self._first_clip, clips, side="right") - 1
        return _BlockClips(
            group, clips - self._first_clip[group], phase.astype(np.int64), np.concatenate([[0], np.cumsum(windows)])
        )


def _leave_out(lengths: np.ndarray, shards: tuple, left_out: Mapping[str, Collection[int]]) -> None:
    """Give the clips that must not be used no length, so that they have no window."""
    first = 0
    for shard in shards:
        rows = left_out.get(shard.name, ())
        lengths[[first + row for row in rows]] = 0
        first += shard.clips


def _check_enough(manifest: Manifest, split: str, shape: WindowShape, batch: int, windows: int, longest: int) -> None:
    where = f"data set {manifest.name}, split {split}"
    if not windows:
        raise DataError(
            f"{where}: no clip has {shape.span} frames, the longest has {longest}",
            fix="Lower clip_frames (or frame_skip) of the stage, or ingest longer clips.",
        )
    if windows < batch:
        raise DataError(
            f"{where}: {windows} windows of {shape.frames} frames do not fill a batch of {batch}",
            fix="Lower batch_clips or clip_frames of the stage, or ingest more video.",
        )


def _mix(group_bytes: int, group_windows: float, batch: int) -> int:
    by_memory = min(_LARGEST_MIX, _BLOCK_BYTES // max(1, group_bytes))
    return max(1, by_memory, int(np.ceil(_BLOCK_BATCHES * batch / group_windows)))


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """The part of a global batch that rank `rank` of `world` trains on: contiguous, sizes differ by at most one."""
    return slice(batch * rank // world, batch * (rank + 1) // world)
