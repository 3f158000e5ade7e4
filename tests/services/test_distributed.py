"""Two workers, and the feed on one and two ranks: the global batches stay the same."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import Manifest, read_manifest
from flam_core.data.order import Window
from flam_core.data.shard import decode_clip, read_row_group
from flam_core.recipes import smoke
from services.feed import FeedPlan, StagePlan, StepBatch, make_dataset, steps_of
from services.storage import resolve
from tests.services.conftest import HEAD_CPUS, Cluster, RayHead, Trained, environment, run_id_of, run_job, said

pytestmark = pytest.mark.timeout(600)

ENVIRONMENT = 3


def plan_of(data: Path, world: int, *stages: StagePlan) -> FeedPlan:
    manifest = read_manifest(LocalFileSystem(), str(data))
    return FeedPlan(resolve(data), manifest, stages, seed=0, world=world)


def digest_of(plan: FeedPlan, rank: int) -> str:
    """The rolling hash of all that a rank consumes."""
    digest = hashlib.sha256(b"flam").hexdigest()
    for step in range(plan.total_steps):
        ids = "".join(window.id for window in plan.windows(step, rank))
        digest = hashlib.sha256((digest + ids).encode()).hexdigest()
    return digest


@pytest.fixture(scope="module")
def two_workers(cluster: Cluster, grid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Recipe `smoke` on two workers."""
    home = tmp_path_factory.mktemp("two-workers")
    arguments = cluster.arguments(grid_data, "two-workers", "--workers", "2", "--worker_cpus", "0.5")
    done = run_job(arguments, environment(), home)
    assert done.returncode == 0, said(done)
    return Trained(home, "two-workers", run_id_of(done.stdout), tuple(arguments), done)


def test_two_workers_are_the_same_run(two_workers: Trained, smoke_run: Trained) -> None:
    assert two_workers.run_id == smoke_run.run_id  # how many workers there are changes nothing that is learnt
    assert (two_workers.outputs / "report.html").is_file()


def test_rank_0_consumed_its_part_of_the_plan(two_workers: Trained, grid_data: Path) -> None:
    config = smoke()
    stages = [StagePlan(s.steps, s.batch_clips, s.clip_frames) for s in (config.tokenizer_stage, config.flam_stage)]
    newest = two_workers.outputs / "checkpoints" / "step-00000050" / "meta.json"
    assert json.loads(newest.read_text())["digest"] == digest_of(plan_of(grid_data, 2, *stages), 0)


def test_two_workers_learn_what_one_learns(two_workers: Trained, smoke_run: Trained) -> None:
    """Had a rank trained on anything but its half of the batch, the tokenizer would be another one."""
    metrics = [json.loads((run.outputs / "metrics.json").read_text()) for run in (two_workers, smoke_run)]
    assert metrics[0]["ceiling/psnr"] == pytest.approx(metrics[1]["ceiling/psnr"], abs=0.05)
    assert metrics[0]["rollout/psnr"] == pytest.approx(metrics[1]["rollout/psnr"], abs=0.2)


def test_mlflow_hears_rank_0_only(two_workers: Trained, cluster: Cluster) -> None:
    run = cluster.tracking.run(two_workers.run_id, "two-workers")
    assert run.info.status == "FINISHED"
    assert cluster.tracking.history(run)["progress/step"] == [(50, 50.0)]


@pytest.mark.parametrize(("workers", "cpus"), [(2, "2"), (4, "1")])
def test_workers_that_leave_the_feed_no_cpu_are_refused_at_once(
    cluster: Cluster, grid_data: Path, tmp_path: Path, workers: int, cpus: str
) -> None:
    arguments = cluster.arguments(grid_data, "refused", "--workers", str(workers), "--worker_cpus", cpus)
    done = run_job(arguments, environment(), tmp_path, seconds=90)
    assert done.returncode == ENVIRONMENT, said(done)
    errors = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert len(errors) == 1, said(done)
    assert f"{workers} workers of {cpus} CPUs" in errors[0]
    assert f"{HEAD_CPUS} CPUs" in errors[0]
    assert "--worker_cpus" in errors[0]
    assert not list(tmp_path.iterdir())
    assert cluster.tracking.client.get_experiment_by_name("refused") is None


STAGES = (StagePlan(steps=5, batch_clips=4, clip_frames=4), StagePlan(steps=14, batch_clips=6, clip_frames=6))
"""19 steps: chunks of 8 that cross the stages' border, and a last one that is not full."""


@pytest.fixture(scope="module")
def connected(ray_head: RayHead) -> Iterator[None]:
    """This process as a driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        ray.init(address=ray_head.address, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


def feed(plan: FeedPlan, start: int) -> list[list[StepBatch]]:
    """What each rank gets, all ranks reading at the same time as Ray Train's workers do."""
    parts = make_dataset(plan, start, task_cpus=0.5).streaming_split(plan.world, equal=True)
    got: list[list[StepBatch]] = [[] for _ in parts]

    def read(rank: int) -> None:
        got[rank] = list(steps_of(parts[rank], rank, start))

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(plan.world)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(200)
    return got


def global_batches(ranks: list[list[StepBatch]]) -> list[tuple[int, tuple[str, ...], str]]:
    """(step, window ids, sha256 of the pixels) of each global batch: the ranks' parts one after the other."""
    batches = []
    for parts in zip(*ranks, strict=True):
        assert len({part.step for part in parts}) == 1
        ids = tuple(name for part in parts for name in part.ids)
        pixels = np.concatenate([part.frames for part in parts])
        batches.append((parts[0].step, ids, hashlib.sha256(pixels.tobytes()).hexdigest()))
    return batches


def read_straight(manifest: Manifest, data: Path, windows: list[Window], length: int) -> str:
    """sha256 of the pixels of windows, read from the shards without the feed."""
    fs, pixels = LocalFileSystem(), []
    for window in windows:
        table = read_row_group(fs, f"{data}/{window.shard}", window.row_group)
        clip = decode_clip(table.to_pylist()[window.row], window.shard)
        pixels.append(clip[window.start : window.start + length])
    return hashlib.sha256(np.stack(pixels).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def fed(connected: None, grid_data: Path) -> dict[int, list[list[StepBatch]]]:
    """All steps for worlds of one and two ranks."""
    return {world: feed(plan_of(grid_data, world, *STAGES), 0) for world in (1, 2)}


def test_feed_gives_what_the_plan_says(fed: dict[int, list[list[StepBatch]]], grid_data: Path) -> None:
    plan = plan_of(grid_data, 1, *STAGES)
    batches = global_batches(fed[1])
    assert [step for step, _, _ in batches] == list(range(plan.total_steps))
    for step, ids, pixels in batches:
        windows = plan.windows(step, 0)
        stage = STAGES[plan.stage_of(step)[0]]
        assert ids == tuple(window.id for window in windows)
        assert pixels == read_straight(plan.manifest, grid_data, windows, stage.clip_frames), f"step {step}"


def test_ranks_of_two_together_get_the_batches_of_one(fed: dict[int, list[list[StepBatch]]], grid_data: Path) -> None:
    assert global_batches(fed[2]) == global_batches(fed[1])
    plan = plan_of(grid_data, 2, *STAGES)
    for rank, batches in enumerate(fed[2]):
        for batch in batches:
            assert batch.ids == [window.id for window in plan.windows(batch.step, rank)]
            assert len(batch.frames) == STAGES[plan.stage_of(batch.step)[0]].batch_clips // 2


@pytest.mark.parametrize(("world", "start"), [(1, 7), (2, 3)])
def test_feed_from_a_later_step_is_the_tail(
    fed: dict[int, list[list[StepBatch]]], grid_data: Path, world: int, start: int
) -> None:
    assert global_batches(feed(plan_of(grid_data, world, *STAGES), start)) == global_batches(fed[1])[start:]
