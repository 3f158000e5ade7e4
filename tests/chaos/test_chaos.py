"""Runs that are killed, hung, starved and cut off end as if nothing had happened, or stop and say why."""

from __future__ import annotations

import json
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest

from services.storage import resolve
from services.tracking.journal import segments
from services.watch import BUCKETS
from tests.services.conftest import (
    RESUME_SETTINGS,
    RESUME_STEPS,
    Cluster,
    Trained,
    committed,
    environment,
    run_id_of,
    run_job,
    said,
    storage_environment,
    train,
    until,
)

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(900)]

ENVIRONMENT, STOPPED, FAILED = 3, 75, 5
LOGGED = [50, 100, 150, 200, 250]


def history(cluster: Cluster, trained: Trained) -> dict[str, list[tuple[int, float]]]:
    """Without what depends on the machine: how fast, and what was read since the start."""
    run = cluster.tracking.run(trained.run_id, trained.experiment)
    found = cluster.tracking.history(run)
    return {k: v for k, v in found.items() if not k.startswith(("speed/", "feed/", "system/", "goodput/"))}


def goodput(trained: Trained) -> dict:
    return json.loads((trained.outputs / "goodput.json").read_text())


@pytest.fixture(scope="module")
def killed(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Twenty kills at random steps."""
    steps = sorted(random.Random(0).sample(range(3, RESUME_STEPS - 3), 20))
    faults = ",".join(f"kill:0@{step}" for step in steps)
    more = (*RESUME_SETTINGS[:-1], "10", "--chaos", faults)
    return train(cluster, tmp_path_factory.mktemp("killed"), grid_data, "killed", *more)


def test_twenty_kills_change_no_weight(killed: Trained, unbroken_run: Trained) -> None:
    assert killed.done.stdout.count("chaos: kill") == 20
    assert killed.weights == unbroken_run.weights
    metas = [
        json.loads((one.outputs / "checkpoints" / f"step-{RESUME_STEPS:08d}" / "meta.json").read_text())["consumed"]
        for one in (killed, unbroken_run)
    ]
    assert metas[0] == metas[1]


def test_twenty_kills_leave_one_history(killed: Trained, unbroken_run: Trained, cluster: Cluster) -> None:
    assert history(cluster, killed) == history(cluster, unbroken_run)
    assert [step for step, _ in history(cluster, killed)["progress/step"]] == LOGGED


def test_a_killed_run_says_what_it_lost(killed: Trained) -> None:
    """Never a committed step: it resumes at the newest multiple of 10 before the kill."""
    kills = [int(step) for step in re.findall(r"chaos: kill:0@\d+ in step (\d+)", killed.done.stdout)]
    resumed = [int(step) for step in re.findall(r"resumed at step (\d+) of \d+, lost [\d.]+ s", killed.done.stdout)]
    assert len(resumed) == len(kills) == 20
    for kill, step in zip(kills, resumed, strict=True):
        # The checkpoint of the step before may be on its way still when the kill comes.
        assert step in (kill // 10 * 10, kill // 10 * 10 - 10), (kill, step)
    failures = [json.loads(place.read_text()) for place in (killed.outputs / "failures").iterdir()]
    assert len(failures) == 20
    assert all(one["errors"]["0"] for one in failures)


def test_every_second_is_in_one_bucket(killed: Trained) -> None:
    (attempt,) = goodput(killed)["attempts"]
    seconds = attempt["seconds"]
    assert set(seconds) == set(BUCKETS)
    assert attempt["restarts"] == 20
    assert seconds["restart"] > seconds["recompute"] > 0
    assert seconds["productive"] > 0
    ended = (killed.outputs / "goodput.json").stat().st_mtime
    assert sum(seconds.values()) == pytest.approx(ended - attempt["started"], rel=0.01)


def test_spans_open_as_one_trace(killed: Trained) -> None:
    trace = json.loads((killed.outputs / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {"start", "data", "forward", "backward", "optimiser", "checkpoint"} <= {event["name"] for event in events}
    assert all(event["dur"] >= 0 and event["ts"] > 0 for event in events)


def test_worlds_of_other_sizes_learn_the_same(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path
) -> None:
    """One worker, then two, then one again; each stopped by SIGTERM."""
    arguments = cluster.arguments(grid_data, "sizes", *RESUME_SETTINGS, "--worker_cpus", "0.5")
    faults = ("--chaos", "sigterm@80,sigterm@160")
    for workers in ("1", "2"):
        done = run_job([*arguments, *faults, "--workers", workers], environment(), tmp_path)
        assert done.returncode == STOPPED, said(done)
        assert "was stopped (SIGTERM)" in done.stderr
        assert "The same command goes on" in done.stderr
    done = run_job([*arguments, *faults, "--workers", "1"], environment(), tmp_path)
    assert done.returncode == 0, said(done)
    assert re.search(r"resumed at step 1[67]\d of 250, lost 0.0 s", done.stdout), said(done)
    trained = Trained(tmp_path, "sizes", run_id_of(done.stdout), tuple(arguments), done)
    meta = [
        json.loads((one.outputs / "checkpoints" / f"step-{RESUME_STEPS:08d}" / "meta.json").read_text())["consumed"]
        for one in (trained, unbroken_run)
    ]
    assert meta[0] == meta[1]
    mine, other = (dict(history(cluster, one)["flam/loss"]) for one in (trained, unbroken_run))
    assert mine.keys() == other.keys()
    # Sums over ranks round in another order, which training magnifies.
    assert [mine[step] for step in LOGGED] == pytest.approx([other[step] for step in LOGGED], rel=0.15)
    assert cluster.tracking.run(trained.run_id, "sizes").info.status == "FINISHED"


def test_a_rank_that_hangs_is_named_and_ended(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path
) -> None:
    more = ("--workers", "2", "--worker_cpus", "0.5", "--chaos", "hang@70", "--stall_seconds", "8")
    trained = train(cluster, tmp_path, grid_data, "hangs", *RESUME_SETTINGS, *more)
    found = re.search(
        r"stall: rank 1 of 2 \(pid \d+ on \S+\) has been in stage forward of step 70 for \d+ s, which reads "
        r"\S+\.parquet; stacks of all ranks: (\S+); it is ended",
        trained.done.stdout,
    )
    assert found, said(trained.done)
    stacks = Path(found[1]).read_text()
    assert "=== rank 0" in stacks
    assert "chaos.py" in stacks.partition("=== rank 1")[2]
    assert "resumed at step 50" in trained.done.stdout


def test_a_gradient_that_is_not_a_number_is_left_out(cluster: Cluster, grid_data: Path, tmp_path: Path) -> None:
    trained = train(cluster, tmp_path, grid_data, "nan", *RESUME_SETTINGS, "--chaos", "nan@70")
    assert "going back: the gradient is not finite at step 70" in trained.done.stdout
    assert "resumed at step 50" in trained.done.stdout
    (spoilt,) = json.loads((trained.outputs / "skipped.json").read_text())
    assert spoilt["steps"] == [70]
    run = cluster.tracking.run(trained.run_id, "nan")
    assert "not finite" in run.data.tags["skipped.70"]
    assert [step for step, _ in history(cluster, trained)["progress/step"]] == LOGGED


def test_what_spoils_every_batch_is_no_accident(cluster: Cluster, grid_data: Path, tmp_path: Path) -> None:
    arguments = cluster.arguments(grid_data, "nans", *RESUME_SETTINGS, "--chaos", "nan@20,nan@21,nan@22,nan@23")
    done = run_job(arguments, environment(), tmp_path)
    assert done.returncode == FAILED, said(done)
    assert "after the run went back 3 times already" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("flam: error:")]) == 1
    assert cluster.tracking.run(run_id_of(done.stdout), "nans").info.status == "FAILED"


def test_a_corrupt_newest_checkpoint_costs_its_steps_alone(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path
) -> None:
    trained = train(cluster, tmp_path, grid_data, "corrupt", *RESUME_SETTINGS, "--chaos", "corrupt-checkpoint@150")
    assert "step-00000150 is damaged (model.safetensors) and is passed over" in trained.done.stdout
    assert "resumed at step 100" in trained.done.stdout
    assert trained.weights == unbroken_run.weights


def test_mlflow_down_holds_nothing_up_and_misses_nothing(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path
) -> None:
    """Five crashes, and MLflow away for a third of the run."""
    faults = "mlflow-down@60," + ",".join(f"kill:0@{step}" for step in (40, 90, 130, 170, 220))
    trained = train(cluster, tmp_path, grid_data, "down", *RESUME_SETTINGS, "--chaos", faults)
    assert trained.done.stdout.count("chaos: kill") == 5
    assert "warning: MLflow at" in trained.done.stdout
    assert "is back" in trained.done.stdout
    assert history(cluster, trained) == history(cluster, unbroken_run)
    assert trained.weights == unbroken_run.weights
    written = [line.step for _, lines in segments(resolve(str(trained.outputs))) for line in lines if line.step]
    assert written == LOGGED


def test_a_store_that_answers_503_to_a_fifth_of_requests(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path, s3_server
) -> None:
    """Data and run are both there, so that reading, checkpoints and the journal meet them."""
    bucket, client = s3_server(), boto3.client("s3")
    for file in grid_data.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), bucket, f"grid/{file.relative_to(grid_data).as_posix()}")
    more = ("--storage", f"s3://{bucket}/runs", "--chaos", "s3-503,kill:0@120")
    arguments = cluster.arguments(f"s3://{bucket}/grid", "s503", *RESUME_SETTINGS, *more)
    done = run_job(arguments, environment(**storage_environment()), tmp_path)
    assert done.returncode == 0, said(done)
    trained = Trained(tmp_path, "s503", run_id_of(done.stdout), tuple(arguments), done)
    assert "chaos: s3-503: requests of process" in done.stdout
    assert trained.weights == unbroken_run.weights
    assert history(cluster, trained) == history(cluster, unbroken_run)


def test_weights_that_are_shared_out_outlive_a_kill(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path
) -> None:
    """FSDP2 over two workers, of which one is killed."""
    more = ("--workers", "2", "--worker_cpus", "0.5", "--parallel", "fsdp", "--chaos", "kill:1@120")
    trained = train(cluster, tmp_path, grid_data, "fsdp", *RESUME_SETTINGS, *more)
    assert "resumed at step 100" in trained.done.stdout
    mine, other = (dict(history(cluster, one)["flam/loss"]) for one in (trained, unbroken_run))
    # Rounding, which training magnifies; tests/unit/test_ranks.py compares step by step.
    assert [mine[step] for step in LOGGED] == pytest.approx([other[step] for step in LOGGED], rel=0.3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory, that can be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, small_disk: Path, tmp_path: Path
) -> None:
    arguments = cluster.arguments(
        grid_data, "full", *RESUME_SETTINGS, "--storage", str(small_disk), "--chaos", "slow:0"
    )
    index = small_disk / unbroken_run.run_id / "checkpoints" / "index.json"
    ballast = small_disk / "ballast"

    def fill() -> None:
        until(lambda: bool(committed(index)))
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    filler = threading.Thread(target=fill)
    filler.start()
    done = run_job(arguments, environment(), tmp_path)
    filler.join()
    assert done.returncode == ENVIRONMENT, said(done)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert "No space left" in line
    assert str(small_disk) in line
    before = max(committed(index))
    ballast.unlink()
    done = run_job(arguments, environment(), tmp_path)
    assert done.returncode == 0, said(done)
    assert f"resumed at step {before} of 250" in done.stdout
    trained = Trained(tmp_path, "full", run_id_of(done.stdout), tuple(arguments), done)
    assert trained.weights == unbroken_run.weights
    assert history(cluster, trained) == history(cluster, unbroken_run)


def test_workers_that_get_nowhere_end_the_run(cluster: Cluster, grid_data: Path, tmp_path: Path) -> None:
    faults = ",".join(f"kill:0@{step}" for step in (3, 4, 5))
    arguments = cluster.arguments(grid_data, "nowhere", *RESUME_SETTINGS, "--chaos", faults, "--max_restarts", "1")
    done = run_job(arguments, environment(), tmp_path)
    assert done.returncode == FAILED, said(done)
    assert "the workers ended 2 times in a row without a new checkpoint after step 0" in done.stderr
    again = run_job(arguments, environment(), tmp_path)
    assert again.returncode == 0, said(again)
