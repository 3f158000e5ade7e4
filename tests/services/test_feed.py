"""The feed on a real Ray: the plan's batches and nothing else, whatever the world, the decoding and the source."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import read_manifest
from flam_core.data.order import ClipKey
from flam_core.data.quarantine import BadClip, Quarantine
from flam_core.data.shard import read_row_group
from flam_core.errors import DataError
from services.feed import Assembler, CacheSettings, StagePlan, make_dataset, steps_of
from services.storage import resolve
from tests.services.conftest import environment, run_job, said
from tests.services.feed_fixture import (
    INGEST,
    STAGES,
    Batches,
    Broken,
    batches,
    feed,
    plan_of,
    read_straight,
    source_of,
    upload,
)

pytest_plugins = ("tests.services.feed_fixture",)
pytestmark = pytest.mark.timeout(600)


def test_feed_gives_what_the_plan_says(whole: Batches, small_data: Path) -> None:
    plan = plan_of(source_of(small_data))
    assert [step for step, _, _ in whole] == list(range(plan.total_steps))
    for step, ids, pixels in whole:
        windows = plan.windows(step, 0)
        assert ids == tuple(window.id for window in windows)
        assert pixels == read_straight(plan, windows, STAGES[plan.stage_of(step)[0]]), f"step {step}"


@pytest.mark.parametrize(
    ("world", "start", "decode"), [(2, 0, "worker"), (3, 0, "task"), (1, 7, "task"), (2, 11, "auto")]
)
def test_any_world_and_any_decoding_give_the_same_global_batches(
    whole: Batches, small_data: Path, world: int, start: int, decode: str
) -> None:
    plan = plan_of(source_of(small_data), world=world, decode=decode)
    assert batches(feed(plan, start)[0]) == whole[start:]


def test_a_clip_is_decoded_once_and_a_row_group_read_once(connected: None, small_data: Path) -> None:
    """However many windows of it an epoch takes."""
    source = source_of(small_data)
    shape = StagePlan(steps=1, batch_clips=6, clip_frames=4, window_stride=2)
    order = plan_of(source, stages=(shape,)).mixtures()[0].orders[0]
    steps = order.epoch_windows // 6
    _, (meters,) = feed(plan_of(source, stages=(StagePlan(steps, 6, 4, window_stride=2),)))
    train = [shard for shard in source.manifest.shards if shard.split == "train"]
    # The last batch of the epoch may be cut off, and with it windows, but hardly a clip.
    assert sum(s.clips for s in train) - 1 <= meters.decoded_clips <= sum(s.clips for s in train)
    assert steps * 6 > 15 * meters.decoded_clips


def test_pixels_go_with_their_last_window(connected: None, small_data: Path) -> None:
    """By their count of references: circles of them would stay until Python looks for circles, gigabytes later."""
    plan, seen = plan_of(source_of(small_data)), []

    class Watched(Assembler):
        def _pixels(self, key: ClipKey, row: dict[str, Any]) -> np.ndarray:
            pixels = super()._pixels(key, row)
            seen.append(weakref.ref(pixels))
            return pixels

    (shard,) = make_dataset(plan, 0, task_cpus=0.5).streaming_split(1, equal=True)
    assembler = Watched(plan, 0, threads=2)
    gc.collect()
    gc.disable()
    try:
        for _ in steps_of(shard, plan, 0, assembler, 0):
            pass
        assembler.close()
        del assembler
        assert not [pixels for pixels in seen if pixels() is not None]
    finally:
        gc.enable()
    assert seen


def test_skip_and_stride_and_two_data_sets(connected: None, small_data: Path, tmp_path: Path) -> None:
    done = run_job(["ingest", *INGEST, "--seed", "9", "--out", "other"], environment(), tmp_path)
    assert done.returncode == 0, said(done)
    sources = source_of(small_data, weight=2.0), source_of(tmp_path / "other")
    stages = (StagePlan(steps=20, batch_clips=6, clip_frames=5, frame_skip=3, window_stride=2),)
    plan = plan_of(*sources, stages=stages)
    found = batches(feed(plan)[0])
    for step, ids, pixels in found:
        windows = plan.windows(step, 0)
        assert [window.clip.source for window in windows].count(0) == 4
        assert ids == tuple(window.id for window in windows)
        assert pixels == read_straight(plan, windows, stages[0])
    assert batches(feed(plan_of(*sources, stages=stages, world=2), 9)[0]) == found[9:]


def test_a_bucket_gives_the_same_and_a_cache_spares_it_the_second_time(
    whole: Batches, s3_server: Callable[[], str], small_data: Path, tmp_path: Path
) -> None:
    place = resolve(f"s3://{s3_server()}/small")
    upload(small_data, place)
    plan, cache = plan_of(source_of(place.uri)), CacheSettings(str(tmp_path / "cache"), 1 << 30)
    got, (first,) = feed(plan, cache=cache)
    assert batches(got) == whole
    assert first.reading["bytes_read"] > 0
    got, (second,) = feed(plan, cache=cache)
    assert batches(got) == whole
    assert second.reading["bytes_read"] == 0
    assert second.reading["cache_hits"] > 0


def spoil(spoilt: Path, clip: int) -> tuple[str, int]:
    """Flip a byte in the payload of a clip of the train split; its shard and row."""
    manifest = read_manifest(LocalFileSystem(), str(spoilt))
    shard = next(shard for shard in manifest.shards if shard.split == "train")
    file = spoilt / shard.name
    payload = read_row_group(LocalFileSystem(), str(file), clip // 2).to_pylist()[clip % 2]["payload"]
    content = bytearray(file.read_bytes())
    content[content.index(payload) + len(payload) // 2] ^= 1
    file.write_bytes(bytes(content))
    return shard.name, clip


@pytest.fixture
def spoilt(small_data: Path, tmp_path: Path) -> Path:
    """A copy of the data, to spoil."""
    copy = tmp_path / "spoilt"
    for file in small_data.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(small_data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("decode", ["worker", "task"])
def test_windows_of_a_broken_clip_are_left_out_and_nothing_takes_their_place(
    whole: Batches, spoilt: Path, decode: str
) -> None:
    shard, row = spoil(spoilt, 5)
    broken: Broken = []
    got, (meters,) = feed(plan_of(source_of(spoilt), decode=decode), broken=broken)
    gone = f"{shard}/{row // 2}/{row % 2}@"
    assert [ids for _, ids, _ in batches(got)] == [
        tuple(name for name in ids if not name.startswith(gone)) for _, ids, _ in whole
    ]
    assert {(source, bad.shard, bad.row) for source, bad in broken} == {(0, shard, row)}
    assert all("crc32" in bad.reason for _, bad in broken)
    assert meters.broken_clips == len(broken)


def test_quarantined_clips_are_not_in_the_plan(connected: None, small_data: Path) -> None:
    shard = read_manifest(LocalFileSystem(), str(small_data)).split("train")[0]
    quarantine = Quarantine(clips=(BadClip(shard.name, 5, None, "made up"), BadClip(shard.name, 0, None, "made up")))
    plan = plan_of(source_of(small_data, quarantine=quarantine))
    assert plan != plan_of(source_of(small_data))
    ids = {name.rpartition("@")[0] for _, names, _ in batches(feed(plan)[0]) for name in names}
    assert not ids & {f"{shard.name}/2/1", f"{shard.name}/0/0"}
    assert len(ids) == shard.clips - 2


def test_a_batch_of_broken_clips_alone_stops(connected: None, spoilt: Path) -> None:
    for shard in read_manifest(LocalFileSystem(), str(spoilt)).split("train"):
        (spoilt / shard.name).write_bytes(b"no parquet")
    with pytest.raises(DataError, match="all 6 clips of rank 0 at step 0 are broken"):
        feed(plan_of(source_of(spoilt)))


def test_read_tasks_say_what_they_took(connected: None, small_data: Path) -> None:
    _, (meters,) = feed(plan_of(source_of(small_data)))
    clips = meters.decoded_clips
    taken = meters.take(2.0)
    assert taken["feed/decoded_frames"] == 40 * clips > 0
    assert taken["feed/read_frames_per_second"] > 0
    assert taken["feed/bytes_per_second"] == taken["feed/bytes_read"] / 2 > 0
    assert taken["feed/bytes_from_bucket"] == 0
    assert set(meters.take(1.0).values()) == {0.0}
