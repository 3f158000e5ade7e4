"""Jobs on a cluster: stopped, submitted twice, followed, and with a node that is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.conftest import (
    REPOSITORY,
    RESUME_SETTINGS,
    Cluster,
    Trained,
    committed,
    environment,
    run_id_of,
    run_job,
    said,
    until,
)

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(600)]

ENVIRONMENT = 3


def ray_job(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ray")), "job", words[0], "--address", cluster.head.dashboard]
    return subprocess.run(
        [*command, *words[1:]], env=environment(), capture_output=True, text=True, timeout=400, check=False
    )


def test_a_job_that_is_stopped_commits_and_goes_on(
    cluster: Cluster, grid_data: Path, unbroken_run: Trained, tmp_path: Path
) -> None:
    """While it runs: a second submit is refused, and anyone can follow it."""
    storage = tmp_path / "outputs"
    arguments = cluster.arguments(grid_data, "stopped", *RESUME_SETTINGS, "--chaos", "slow:0")
    command = ["python", str(REPOSITORY / "jobs" / "train.py"), *arguments[1:], "--storage", str(storage)]
    done = ray_job(cluster, "submit", "--no-wait", "--submission-id", "first", "--", *command)
    assert done.returncode == 0, said(done)
    index = storage / unbroken_run.run_id / "checkpoints" / "index.json"
    until(lambda: len(committed(index)) >= 1)

    second = run_job([*arguments, "--storage", str(storage)], environment(), tmp_path, seconds=100)
    assert second.returncode == ENVIRONMENT, said(second)
    assert "is running already" in second.stderr
    assert "--follow" in second.stderr
    listed = run_job(
        ["train", "--list", "--tracking", cluster.tracking.uri, "--experiment", "stopped"], environment(), tmp_path
    )
    assert re.search(rf"{unbroken_run.run_id} .* running ", listed.stdout), said(listed)

    assert ray_job(cluster, "stop", "first").returncode == 0
    logs = ray_job(cluster, "logs", "first").stdout
    assert "SIGTERM: the workers commit a checkpoint and end" in logs, logs[-3000:]
    run = cluster.tracking.run(unbroken_run.run_id, "stopped")
    until(lambda: cluster.tracking.client.get_run(run.info.run_id).info.status == "KILLED", 30)
    stopped_at = max(committed(index))
    assert stopped_at % 50  # it was committed because it was stopped

    done = run_job([*arguments, "--storage", str(storage)], environment(), tmp_path)
    assert done.returncode == 0, said(done)
    assert f"resumed at step {stopped_at} of 250" in done.stdout
    trained = Trained(tmp_path, "stopped", run_id_of(done.stdout), tuple(arguments), done)
    assert trained.weights == unbroken_run.weights
    followed = run_job(["train", "--follow", unbroken_run.run_id, "--storage", str(storage)], environment(), tmp_path)
    assert followed.returncode == 0, said(followed)
    assert re.search(r"^step 250  loss", followed.stdout, re.MULTILINE)
