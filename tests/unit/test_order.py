"""The sample order: a pure function of (manifest, seed, n) that shows every window once an epoch."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flam_core.data.manifest import Manifest, Shard
from flam_core.data.order import ClipKey, SampleOrder, Window, WindowShape, rank_slice
from flam_core.errors import DataError

Layout = list[list[list[int]]]  # shards > row groups > clips: the length of each


def shard(split: str, index: int, groups: list[list[int]]) -> Shard:
    lengths = tuple(length for group in groups for length in group)
    return Shard(
        name=f"shards/{split}-{index:05d}.parquet",
        split=split,
        bytes=1000,
        sha256=f"{index:064x}",
        clips=len(lengths),
        frames=sum(lengths),
        clip_frames=lengths,
        row_groups=tuple(len(group) for group in groups),
    )


def manifest(train: Layout) -> Manifest:
    shards = (*(shard("train", i, groups) for i, groups in enumerate(train)), shard("val", 0, [[9]]))
    shards = (*shards, shard("test", 0, [[2, 3]]))
    return Manifest(
        name="made",
        source="a test",
        licence="Apache-2.0",
        settings={},
        codec="zstd",
        frame_size=(8, 8),
        fps=None,
        has_truth=False,
        episodes={"train": 1, "val": 1, "test": 1},
        clips=sum(part.clips for part in shards),
        frames=sum(part.frames for part in shards),
        shards=shards,
    )


def order(
    layout: Layout, frames: int = 3, batch: int = 1, seed: int = 0, mix: int | None = 4, **more: Any
) -> SampleOrder:
    shape = WindowShape(frames, more.pop("skip", 1), more.pop("stride", None))
    return SampleOrder(manifest(layout), "train", shape=shape, batch=batch, seed=seed, mix=mix, **more)


def clip_lengths(layout: Layout) -> dict[tuple[str, int, int], int]:
    return {
        (f"shards/train-{s:05d}.parquet", g, row): length
        for s, groups in enumerate(layout)
        for g, group in enumerate(groups)
        for row, length in enumerate(group)
    }


def epoch(of: SampleOrder, number: int) -> list[Window]:
    return of.windows(number * of.epoch_windows, (number + 1) * of.epoch_windows)


# A clip of at least 3 frames comes first, so that there is a window of 3.
clips = st.lists(st.integers(1, 11), min_size=1, max_size=4)
layouts = st.lists(st.lists(clips, min_size=1, max_size=4), min_size=1, max_size=3).map(
    lambda layout: [[[5, *layout[0][0]], *layout[0][1:]], *layout[1:]]
)
seeds = st.integers(0, 2**32)
MANY: Layout = [[[12, 10, 7], [9, 30]], [[8], [11, 4, 25], [6, 6, 6]], [[40], [13]]]


@given(layouts, st.integers(1, 3), seeds, st.integers(1, 5), st.integers(0, 3), st.data())
def test_an_epoch_holds_each_window_of_each_clip_once(
    layout: Layout, frames: int, seed: int, mix: int, number: int, data: st.DataObject
) -> None:
    windows = order(layout, frames).epoch_windows
    of = order(layout, frames, seed=seed, mix=mix, batch=data.draw(st.integers(1, windows)))
    starts = defaultdict(list)
    for window in epoch(of, number):
        starts[window.clip[1:]].append(window.start)
    lengths = clip_lengths(layout)
    assert {clip: len(found) for clip, found in starts.items()} == {
        clip: length // frames for clip, length in lengths.items() if length >= frames
    }
    for clip, found in starts.items():
        found.sort()
        assert found[0] >= 0
        assert found[-1] + frames <= lengths[clip]
        # One phase a clip and epoch: windows touch, so they are disjoint and none is left out.
        assert [b - a for a, b in pairwise(found)] == [frames] * (len(found) - 1)


@given(layouts, seeds, st.integers(1, 4), st.data())
def test_a_batch_is_a_pure_function_of_its_number(layout: Layout, seed: int, batch: int, data: st.DataObject) -> None:
    one, other = (order(layout, 1, batch, seed) for _ in range(2))
    numbers = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    forwards = {n: one.batch(n) for n in numbers}
    for n in reversed(numbers):
        assert other.batch(n) == forwards[n]
        assert one.batch(n) == forwards[n]


@given(layouts, seeds, st.integers(1, 4), st.integers(0, 12))
def test_a_resumed_order_continues_the_unbroken_one(layout: Layout, seed: int, batch: int, resumed_at: int) -> None:
    unbroken = order(layout, 1, batch, seed)
    stream = [window for n in range(16) for window in unbroken.batch(n)]
    resumed = order(layout, 1, batch, seed)
    assert [w for n in range(resumed_at, 16) for w in resumed.batch(n)] == stream[resumed_at * batch :]


@given(layouts, seeds, st.integers(1, 4))
def test_batches_walk_through_epochs_without_gap_or_overlap(layout: Layout, seed: int, batch: int) -> None:
    of = order(layout, 1, batch, seed)
    stream = [window for n in range(3 * of.epoch_windows) for window in of.batch(n)]
    for number in range(3 * batch):
        part = stream[number * of.epoch_windows : (number + 1) * of.epoch_windows]
        assert part == epoch(of, number)


@given(st.integers(1, 64), st.integers(1, 8))
def test_ranks_share_out_a_batch_evenly_and_in_order(batch: int, world: int) -> None:
    parts = [list(range(batch))[rank_slice(batch, rank, world)] for rank in range(world)]
    assert [sample for part in parts for sample in part] == list(range(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("world", range(1, 9))
def test_the_union_over_ranks_does_not_depend_on_the_world_size(world: int) -> None:
    of = order(MANY, batch=11)
    for n in range(8):
        batch = of.batch(n)
        assert [w for rank in range(world) for w in batch[rank_slice(len(batch), rank, world)]] == batch


@given(layouts, seeds, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=50)
def test_the_shuffle_stays_within_blocks_of_row_groups(
    layout: Layout, seed: int, mix: int, batch: int, number: int
) -> None:
    of = order(layout, 1, seed=seed, mix=mix, batch=batch)
    first, seen = number * of.epoch_windows, set[tuple[str, int]]()
    blocks = [of.block(number * of.epoch_blocks + i) for i in range(of.epoch_blocks)]
    for block in blocks:
        assert block.start == first
        assert [of.block_at(i) for i in (block.start, block.end - 1)] == [block, block]
        groups = {window.clip[1:3] for window in of.windows(block.start, block.end)}
        assert len(groups) == len(block.groups) <= mix
        assert not groups & seen
        seen |= groups
        first = block.end
    assert first == (number + 1) * of.epoch_windows
    sizes = [len(block.groups) for block in blocks]
    assert max(sizes) - min(sizes) <= 1


def test_the_windows_of_a_block_are_mixed() -> None:
    of = order([[[30] * 4] * 8], mix=4, batch=4)
    groups = [window.clip.row_group for window in epoch(of, 0)]
    assert [len(set(groups[i : i + 4])) for i in range(0, 40, 4)] == [4] * 10  # a lane for each group
    assert len(set(groups)) == 8
    one_at_a_time = [window.clip.row_group for window in epoch(order([[[30] * 4] * 8], mix=1), 0)]
    assert sum(a != b for a, b in pairwise(one_at_a_time)) == 7


def test_a_batch_takes_its_windows_from_different_clips() -> None:
    of = order([[[40] * 16] * 8], frames=4, mix=4, batch=16)
    assert all(len({window.clip for window in of.batch(n)}) == 16 for n in range(80))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_out_the_clips_of_a_block(world: int) -> None:
    """No clip is decoded by two ranks, but where the border of two ranks falls within one."""
    of = order([[[40] * 12] * 8], frames=4, mix=8, batch=8)
    users = Counter[tuple]()
    for rank in range(world):
        part = rank_slice(8, rank, world)
        windows = [w for n in range(of.epoch_windows // 8) for w in of.batch(n)[part]]
        users.update({window.clip for window in windows})
    assert sum(n - 1 for n in users.values()) <= world - 1


@given(layouts, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), seeds)
def test_windows_with_skip_and_stride_cover_what_they_should(
    layout: Layout, frames: int, skip: int, stride: int, seed: int
) -> None:
    span = (frames - 1) * skip + 1
    lengths = {clip: n for clip, n in clip_lengths(layout).items() if n >= span}
    if not lengths:
        return
    of = order(layout, frames, skip=skip, stride=stride, seed=seed)
    starts = defaultdict(list)
    for window in epoch(of, 1):
        starts[window.clip[1:]].append(window.start)
    assert set(starts) == set(lengths)
    for clip, found in starts.items():
        found.sort()
        assert len(found) == (lengths[clip] - span) // stride + 1
        assert [b - a for a, b in pairwise(found)] == [stride] * (len(found) - 1)
        assert found[0] >= 0
        assert found[-1] + span <= lengths[clip]


@given(layouts, seeds, st.data())
def test_clips_left_out_are_missing_and_nothing_else(layout: Layout, seed: int, data: st.DataObject) -> None:
    clips = sorted(clip_lengths(layout))
    gone = set(data.draw(st.lists(st.sampled_from(clips), unique=True, max_size=len(clips) - 1)))
    left_out = defaultdict(list)
    row_in_shard = Counter[str]()
    for clip in clips:
        if clip in gone:
            left_out[clip[0]].append(row_in_shard[clip[0]])
        row_in_shard[clip[0]] += 1
    of = order(layout, 1, seed=seed, left_out=left_out)
    assert {window.clip[1:] for window in epoch(of, 0)} == set(clips) - gone


def test_many_sections() -> None:
    """More row groups than one section takes."""
    of = order([[[3, 4]] * 1500, [[7]] * 900], frames=3, mix=3, batch=7)
    windows = epoch(of, 2)
    assert len(set(windows)) == len(windows) == of.epoch_windows == 1500 * 2 + 900 * 2
    numbers = [of.block_at(i).number for i in range(2 * of.epoch_windows, 3 * of.epoch_windows)]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(2 * of.epoch_blocks, 3 * of.epoch_blocks))
    assert [of.block(number).number for number in set(numbers)] == list(set(numbers))


def test_seeds_and_epochs_differ() -> None:
    streams = [tuple(epoch(order(MANY, seed=seed), number)) for seed in range(3) for number in range(3)]
    assert len(set(streams)) == 9
    layouts_seen = {tuple(w.clip.row for w in stream) for stream in streams}
    assert len(layouts_seen) == 9


def test_the_phase_of_a_clip_takes_all_values_over_epochs() -> None:
    of = order([[[5]]], frames=3)
    assert {window.start for window in of.windows(0, 60)} == {0, 1, 2}
    assert {window.start for window in order([[[6]]], frames=6).windows(0, 10)} == {0}


def test_other_splits_do_not_enter() -> None:
    of = SampleOrder(manifest(MANY), "test", shape=WindowShape(2), batch=2, seed=0)
    assert of.epoch_windows == 2
    assert {window.clip.shard for window in of.batch(0)} == {"shards/test-00000.parquet"}


def test_window_ids_are_unique_in_an_epoch_and_say_where() -> None:
    assert Window(ClipKey(0, "shards/a.parquet", 2, 1), 7).id == "shards/a.parquet/2/1@7"
    assert Window(ClipKey(3, "shards/a.parquet", 2, 1), 7).id == "3:shards/a.parquet/2/1@7"
    ids = [window.id for window in epoch(order(MANY), 0)]
    assert len(set(ids)) == len(ids)


def test_the_order_of_a_seed_never_changes() -> None:
    # A changed order would silently break the resume of every run that was started before.
    of = order(MANY, frames=4, batch=3, seed=5)
    assert [window.id.removeprefix("shards/train-") for window in of.batch(1) + of.batch(9)] == [
        "00001.parquet/2/2@0",
        "00001.parquet/1/0@3",
        "00002.parquet/0/0@24",
        "00000.parquet/0/0@4",
        "00000.parquet/1/1@9",
        "00000.parquet/0/1@6",
    ]


def test_clips_that_are_too_short_are_refused_with_the_longest() -> None:
    with pytest.raises(DataError, match="data set made, split train: no clip has 12 frames, the longest has 11"):
        order([[[3, 11], [4]]], frames=12)


def test_too_few_windows_for_a_batch_are_refused() -> None:
    order([[[3, 11], [4]]], frames=3, batch=5)
    with pytest.raises(DataError, match="5 windows of 3 frames do not fill a batch of 6"):
        order([[[3, 11], [4]]], frames=3, batch=6)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'training'"):
        SampleOrder(manifest(MANY), "training", shape=WindowShape(3), batch=1, seed=0)
