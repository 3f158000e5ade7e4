"""The feed on a real Ray: the plan's batches and nothing else, whatever the world, the decoding and the source."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import read_manifest
from flam_core.data.order import Window
from flam_core.data.quarantine import BadClip, Quarantine
from flam_core.data.shard import decode_clip, read_row_group
from flam_core.errors import DataError
from services.feed import (
    Assembler,
    CacheSettings,
    FeedMeters,
    FeedPlan,
    FeedSource,
    StagePlan,
    StepBatch,
    make_dataset,
    steps_of,
)
from services.storage import resolve
from tests.services.conftest import RayHead, environment, run_job, said, storage_environment

pytestmark = pytest.mark.timeout(600)

STAGES = (StagePlan(steps=5, batch_clips=6, clip_frames=4), StagePlan(steps=30, batch_clips=6, clip_frames=6))
INGEST = ("--world", "grid", "--size", "24", "--episodes", "30", "--frames", "40", "--option", "cells=6")
"""24 clips of 40 frames to train on."""
Broken = list[tuple[int, BadClip]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of small frames in many row groups."""
    folder = tmp_path_factory.mktemp("feed")
    done = run_job(["ingest", *INGEST, "--row_group_clips", "2", "--out", "data/small"], environment(), folder)
    assert done.returncode == 0, said(done)
    return folder / "data" / "small"


@pytest.fixture(scope="module")
def connected(ray_head: RayHead) -> Iterator[None]:
    """This process as a driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment() | storage_environment()).items():
            patch.setenv(name, value)
        ray.init(address=ray_head.address, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


def source_of(place: Path | str, **more: Any) -> FeedSource:
    location = resolve(place)
    return FeedSource(location, read_manifest(location.fs, location.path), **more)


def plan_of(*sources: FeedSource, world: int = 1, stages: tuple[StagePlan, ...] = STAGES, **more: Any) -> FeedPlan:
    return FeedPlan(sources, stages, seed=3, world=world, **more)


def feed(
    plan: FeedPlan, start: int = 0, *, cache: CacheSettings | None = None, broken: Broken | None = None
) -> tuple[list[list[StepBatch]], list[FeedMeters]]:
    """What each rank gets, all ranks reading at the same time as Ray Train's workers do."""
    parts = make_dataset(plan, start, task_cpus=0.5, cache=cache).streaming_split(plan.world, equal=True)
    got: list[list[StepBatch]] = [[] for _ in parts]
    meters = [FeedMeters() for _ in parts]
    failures: list[BaseException] = []

    def read(rank: int) -> None:
        found: Broken = broken if broken is not None else []
        assembler = Assembler(plan, rank, threads=2, meters=meters[rank], on_broken=lambda *bad: found.append(bad))
        try:
            got[rank] = list(steps_of(parts[rank], plan, start, assembler, rank))
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failures.append(error)
        finally:
            assembler.close()

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(plan.world)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(200)
    if failures:
        raise failures[0]
    return got, meters


def batches(ranks: list[list[StepBatch]]) -> list[tuple[int, tuple[str, ...], str]]:
    """(step, window ids, sha256 of the pixels) of each global batch: the ranks' parts one after the other."""
    found = []
    for parts in zip(*ranks, strict=True):
        assert len({part.step for part in parts}) == 1
        ids = tuple(name for part in parts for name in part.ids)
        pixels = np.concatenate([part.frames for part in parts])
        found.append((parts[0].step, ids, hashlib.sha256(pixels.tobytes()).hexdigest()))
    return found


def read_straight(plan: FeedPlan, windows: list[Window], stage: StagePlan) -> str:
    """sha256 of the pixels of windows, read from the shards without the feed."""
    fs, pixels = LocalFileSystem(), []
    for window in windows:
        data = plan.sources[window.clip.source].data.path
        table = read_row_group(fs, f"{data}/{window.clip.shard}", window.clip.row_group)
        clip = decode_clip(table.to_pylist()[window.clip.row], window.clip.shard)
        pixels.append(clip[window.start :: stage.frame_skip][: stage.clip_frames])
    return hashlib.sha256(np.stack(pixels).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(connected: None, data: Path) -> list[tuple[int, tuple[str, ...], str]]:
    """The batches of one rank over all steps."""
    return batches(feed(plan_of(source_of(data)))[0])


def test_feed_gives_what_the_plan_says(whole: list[tuple[int, tuple[str, ...], str]], data: Path) -> None:
    plan = plan_of(source_of(data))
    assert [step for step, _, _ in whole] == list(range(plan.total_steps))
    for step, ids, pixels in whole:
        windows = plan.windows(step, 0)
        assert ids == tuple(window.id for window in windows)
        assert pixels == read_straight(plan, windows, STAGES[plan.stage_of(step)[0]]), f"step {step}"


@pytest.mark.parametrize(
    ("world", "start", "decode"), [(2, 0, "worker"), (3, 0, "task"), (1, 7, "task"), (2, 11, "auto")]
)
def test_any_world_and_any_decoding_give_the_same_global_batches(
    whole: list[tuple[int, tuple[str, ...], str]], data: Path, world: int, start: int, decode: str
) -> None:
    plan = plan_of(source_of(data), world=world, decode=decode)
    assert batches(feed(plan, start)[0]) == whole[start:]


def test_a_clip_is_decoded_once_and_a_row_group_read_once(connected: None, data: Path) -> None:
    """However many windows of it an epoch takes."""
    source = source_of(data)
    shape = StagePlan(steps=1, batch_clips=6, clip_frames=4, window_stride=2)
    order = plan_of(source, stages=(shape,)).mixtures()[0].orders[0]
    steps = order.epoch_windows // 6
    _, (meters,) = feed(plan_of(source, stages=(StagePlan(steps, 6, 4, window_stride=2),)))
    train = [shard for shard in source.manifest.shards if shard.split == "train"]
    # The last batch of the epoch may be cut off, and with it windows, but hardly a clip.
    assert sum(s.clips for s in train) - 1 <= meters.decoded_clips <= sum(s.clips for s in train)
    assert steps * 6 > 15 * meters.decoded_clips


def test_skip_and_stride_and_two_data_sets(connected: None, data: Path, tmp_path: Path) -> None:
    done = run_job(["ingest", *INGEST, "--seed", "9", "--out", "other"], environment(), tmp_path)
    assert done.returncode == 0, said(done)
    sources = source_of(data, weight=2.0), source_of(tmp_path / "other")
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
    whole: list[tuple[int, tuple[str, ...], str]], s3_server: Callable[[], str], data: Path, tmp_path: Path
) -> None:
    place = resolve(f"s3://{s3_server()}/small")
    for file in sorted(data.rglob("*")):
        if file.is_file():
            with place.fs.open_output_stream(f"{place.path}/{file.relative_to(data)}") as stream:
                stream.write(file.read_bytes())
    plan, cache = plan_of(source_of(place.uri)), CacheSettings(str(tmp_path / "cache"), 1 << 30)
    got, (first,) = feed(plan, cache=cache)
    assert batches(got) == whole
    assert first.reading["bytes_read"] > 0
    got, (second,) = feed(plan, cache=cache)
    assert batches(got) == whole
    assert second.reading["bytes_read"] == 0
    assert second.reading["cache_hits"] > 0


def spoil(data: Path, clip: int) -> tuple[str, int]:
    """Flip a byte in the payload of a clip of the train split; its shard and row."""
    manifest = read_manifest(LocalFileSystem(), str(data))
    shard = next(shard for shard in manifest.shards if shard.split == "train")
    file = data / shard.name
    payload = read_row_group(LocalFileSystem(), str(file), clip // 2).to_pylist()[clip % 2]["payload"]
    content = bytearray(file.read_bytes())
    content[content.index(payload) + len(payload) // 2] ^= 1
    file.write_bytes(bytes(content))
    return shard.name, clip


@pytest.fixture
def spoilt(data: Path, tmp_path: Path) -> Path:
    """A copy of the data, to spoil."""
    copy = tmp_path / "spoilt"
    for file in data.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("decode", ["worker", "task"])
def test_windows_of_a_broken_clip_are_left_out_and_nothing_takes_their_place(
    whole: list[tuple[int, tuple[str, ...], str]], spoilt: Path, decode: str
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


def test_quarantined_clips_are_not_in_the_plan(connected: None, data: Path) -> None:
    shard = read_manifest(LocalFileSystem(), str(data)).split("train")[0]
    quarantine = Quarantine(clips=(BadClip(shard.name, 5, None, "made up"), BadClip(shard.name, 0, None, "made up")))
    plan = plan_of(source_of(data, quarantine=quarantine))
    assert plan != plan_of(source_of(data))
    ids = {name.rpartition("@")[0] for _, names, _ in batches(feed(plan)[0]) for name in names}
    assert not ids & {f"{shard.name}/2/1", f"{shard.name}/0/0"}
    assert len(ids) == shard.clips - 2


def test_a_batch_of_broken_clips_alone_stops(connected: None, spoilt: Path) -> None:
    for shard in read_manifest(LocalFileSystem(), str(spoilt)).split("train"):
        (spoilt / shard.name).write_bytes(b"no parquet")
    with pytest.raises(DataError, match="all 6 clips of rank 0 at step 0 are broken"):
        feed(plan_of(source_of(spoilt)))


def test_read_tasks_say_what_they_took(connected: None, data: Path) -> None:
    _, (meters,) = feed(plan_of(source_of(data)))
    clips = meters.decoded_clips
    taken = meters.take(2.0)
    assert taken["feed/decoded_frames"] == 40 * clips > 0
    assert taken["feed/read_frames_per_second"] > 0
    assert taken["feed/bytes_per_second"] == taken["feed/bytes_read"] / 2 > 0
    assert taken["feed/bytes_from_bucket"] == 0
    assert set(meters.take(1.0).values()) == {0.0}
