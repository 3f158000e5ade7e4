"""What the tests of the feed share: data, plans, and ranks that read at the same time as Ray Train's workers do."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import read_manifest
from flam_core.data.order import Window
from flam_core.data.quarantine import BadClip
from flam_core.data.shard import decode_clip, read_row_group
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
from services.storage import Location, resolve
from tests.services.conftest import RayHead, environment, run_job, said, storage_environment

STAGES = (StagePlan(steps=5, batch_clips=6, clip_frames=4), StagePlan(steps=30, batch_clips=6, clip_frames=6))
INGEST = ("--world", "grid", "--size", "24", "--episodes", "30", "--frames", "40", "--option", "cells=6")
"""24 clips of 40 frames to train on."""
Batches = list[tuple[int, tuple[str, ...], str]]
"""(step, window ids, sha256 of the pixels) of each global batch."""
Broken = list[tuple[int, BadClip]]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def batches(ranks: list[list[StepBatch]]) -> Batches:
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
def whole(connected: None, small_data: Path) -> Batches:
    """The batches of one rank over all steps."""
    return batches(feed(plan_of(source_of(small_data)))[0])


def upload(data: Path, place: Location) -> None:
    """Copy a data set to a bucket."""
    for file in sorted(data.rglob("*")):
        if file.is_file():
            with place.fs.open_output_stream(f"{place.path}/{file.relative_to(data)}") as stream:
                stream.write(file.read_bytes())
