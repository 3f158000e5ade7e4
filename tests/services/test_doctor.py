"""`jobs/doctor.py` against a real cluster, MLflow server and bucket: what is well, and what is not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.services.conftest import Cluster, environment, run_job, said, storage_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SETTINGS, ENVIRONMENT = 2, 3


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in json.loads(done.stdout)}


def test_an_open_cluster_is_fit_for_a_run_and_not_safe(
    cluster: Cluster, grid_data: Path, s3_server: Callable[[], str], tmp_path: Path
) -> None:
    """The cluster of these tests asks for no token, the store believes everybody: both are named."""
    bucket = s3_server()
    places = ["--address", cluster.head.address, "--dashboard", cluster.head.dashboard, "--data", str(grid_data)]
    places += ["--storage", f"s3://{bucket}/runs", "--tracking", cluster.tracking.uri]
    words = ["doctor", *places, "--workers", "2", "--security", "--json"]
    done = run_job(words, environment(**storage_environment()), tmp_path)
    found = rows(done)
    assert done.returncode == ENVIRONMENT, said(done)
    bad = {name for name, row in found.items() if row["state"] == "red"}
    assert bad == {"jobs without the token", "drivers without the token"}, found
    assert "RAY_AUTH_MODE=token" in found["jobs without the token"]["fix"]
    assert found["MLflow without a password"]["state"] == "note"  # nobody else reaches it
    assert found["all-reduce (gloo)"]["seen"].startswith("2 ranks")
    assert "2560 frames" in found["data set"]["seen"]
    assert f"2 of {len(found)} checks are red: jobs without the token, drivers without the token" in done.stderr
    client = cluster.tracking.client
    experiment = client.get_experiment_by_name("flam-doctor")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []  # its run is deleted


def test_each_thing_that_is_missing_is_red_with_what_to_do(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(101 << 20))
    places = ["--address", cluster.head.address, "--tracking", "http://127.0.0.1:9", "--data", "data/none"]
    words = ["doctor", *places, "--storage", "s3://flam-no-such-bucket/runs", "--workers", "64", "--gpu"]
    done = run_job(words, environment(**storage_environment()), tmp_path)
    assert done.returncode == ENVIRONMENT, said(done)
    text = " ".join(done.stdout.split())
    for words_of_a_row in (
        "64 workers of 1 CPUs leave Ray Data less than",
        "the cluster has none",
        "no data set at",
        "flam-no-such-bucket",
        "no MLflow server answers at http://127.0.0.1:9",
        "large.bin (101.0 MiB)",
    ):
        assert words_of_a_row in text, text
    assert "checks are red" in done.stderr


def test_a_cluster_that_is_not_there_leaves_the_rest_to_be_looked_at(tmp_path: Path) -> None:
    done = run_job(["doctor", "--address", "127.0.0.1:9", "--json"], environment(), tmp_path)
    found = rows(done)
    assert done.returncode == ENVIRONMENT, said(done)
    assert [name for name, row in found.items() if row["state"] == "red"] == ["Ray"]
    assert found["storage: write, read, delete"]["state"] == "ok"


def test_settings_that_no_run_takes_are_refused(tmp_path: Path) -> None:
    done = run_job(["doctor", "--workers", "none"], environment(), tmp_path)
    assert done.returncode == SETTINGS, said(done)
    assert len(done.stderr.splitlines()) == 1
