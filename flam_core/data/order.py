"""The sample order: which windows make up global batch n, as a pure function of (manifest, seed, n).

Epochs are unrolled into one endless stream of windows; batch n is the n-th run of `batch` windows of it. Within an
epoch the row groups of the split are put in random order and taken `mix` at a time; the windows of such a group are
shuffled among themselves (bounded shuffle: reads stay local, yet neighbours in the stream are strangers). A clip gives
as many disjoint windows as fit, cut at a phase drawn anew in each epoch. World size, restarts and the transport's
order do not enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flam_core.data.manifest import Manifest
from flam_core.errors import DataError


@dataclass(frozen=True)
class Window:
    """A run of frames of one clip."""

    shard: str
    """Name of the shard, relative to the data set."""
    row_group: int
    row: int
    """Index of the clip in its row group."""
    start: int
    """First frame in the clip."""

    @property
    def id(self) -> str:
        """Unique in a data set."""
        return f"{self.shard}/{self.row_group}/{self.row}@{self.start}"


@dataclass(frozen=True)
class _RowGroup:
    shard: str
    index: int
    clip_frames: np.ndarray
    cumulative: np.ndarray  # [clips + 1]: windows before each clip


class SampleOrder:
    """The order of one split of a data set, for windows of `frames` frames and global batches of `batch` windows."""

    def __init__(self, manifest: Manifest, split: str, *, frames: int, batch: int, seed: int, mix: int = 4) -> None:
        """`mix` row groups are shuffled together.

        Raises DataError if no clip is long enough, or if an epoch has fewer windows than one batch.
        """
        self.frames, self.batch_size, self.seed, self.mix = frames, batch, seed, mix
        self._groups: list[_RowGroup] = []
        longest = 0
        for shard in manifest.split(split):
            start = 0
            for index, clips in enumerate(shard.row_groups):
                lengths = np.array(shard.clip_frames[start : start + clips])
                start += clips
                longest = max(longest, int(lengths.max()))
                cumulative = np.concatenate([[0], np.cumsum(lengths // frames)])
                if cumulative[-1]:
                    self._groups.append(_RowGroup(shard.name, index, lengths, cumulative))
        self._sizes = np.array([group.cumulative[-1] for group in self._groups], dtype=np.int64)
        self.epoch_windows = int(self._sizes.sum())
        """Windows of an epoch."""
        if not self._groups:
            raise DataError(
                f"data set {manifest.name}, split {split}: no clip has {frames} frames, the longest has {longest}",
                fix="Lower clip_frames of the stage, or ingest longer clips.",
            )
        if self.epoch_windows < batch:
            raise DataError(
                f"data set {manifest.name}, split {split}: {self.epoch_windows} windows of {frames} frames do not fill "
                f"a batch of {batch}",
                fix="Lower batch_clips or clip_frames of the stage, or ingest more video.",
            )

    def batch(self, n: int) -> list[Window]:
        """The windows of global batch n >= 0, in order."""
        first = n * self.batch_size
        return [self.window(i) for i in range(first, first + self.batch_size)]

    def window(self, index: int) -> Window:
        """Window number `index` of the endless stream."""
        epoch, within = divmod(index, self.epoch_windows)
        order, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, within, side="right"))
        block_start = int(ends[block - 1]) if block else 0
        shuffled = self._block(epoch, block)[within - block_start]
        members = order[block * self.mix : (block + 1) * self.mix]
        cumulative = np.concatenate([[0], np.cumsum(self._sizes[members])])
        member = int(np.searchsorted(cumulative, shuffled, side="right")) - 1
        number = int(members[member])
        group, local = self._groups[number], int(shuffled - cumulative[member])
        row = int(np.searchsorted(group.cumulative, local, side="right")) - 1
        slack = int(group.clip_frames[row]) % self.frames
        phase = int(_rng(self.seed, epoch, 2, number, row).integers(slack + 1)) if slack else 0
        start = phase + (local - int(group.cumulative[row])) * self.frames
        return Window(group.shard, group.index, row, start)

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its process
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of row groups, and the number of windows up to the end of each block of `mix` of them."""
        order = _rng(self.seed, epoch, 0).permutation(len(self._groups))
        sizes = np.add.reduceat(self._sizes[order], np.arange(0, len(order), self.mix))
        return order, np.cumsum(sizes)

    @lru_cache(maxsize=4)  # noqa: B019 - as above
    def _block(self, epoch: int, block: int) -> np.ndarray:
        """The order of the windows of a block."""
        ends = self._epoch(epoch)[1]
        size = int(ends[block] - (ends[block - 1] if block else 0))
        return _rng(self.seed, epoch, 1, block).permutation(size)


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """The part of a global batch that rank `rank` of `world` trains on: contiguous, sizes differ by at most one."""
    return slice(batch * rank // world, batch * (rank + 1) // world)
