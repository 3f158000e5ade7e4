"""Two workers are the same run as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import read_manifest
from services.feed import FeedPlan, FeedSource, StagePlan
from services.storage import resolve
from tests.services.conftest import HEAD_CPUS, Cluster, Trained, environment, run_id_of, run_job, said

pytestmark = pytest.mark.timeout(600)

ENVIRONMENT = 3


def plan_of(data: Path, world: int, *stages: StagePlan) -> FeedPlan:
    manifest = read_manifest(LocalFileSystem(), str(data))
    return FeedPlan((FeedSource(resolve(data), manifest),), stages, seed=0, world=world)


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


def test_two_workers_consumed_what_one_consumes(two_workers: Trained, smoke_run: Trained) -> None:
    one, two = (
        json.loads((run.outputs / "checkpoints" / "step-00000050" / "meta.json").read_text())["consumed"]
        for run in (smoke_run, two_workers)
    )
    assert one == two
    assert int(one, 16) > 0


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
