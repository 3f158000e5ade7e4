"""`make cluster METRICS=1`: a Prometheus that finds Ray's own metrics and the Pushgateway."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from services.local import running
from tests.services.conftest import REPOSITORY, environment, run_job, said

PORTS = [f"--{part}_port=0" for part in ("ray", "dashboard", "mlflow", "s3", "prometheus", "pushgateway")]
PROGRAMS = ("prometheus", "prometheus-pushgateway")


def test_make_cluster_hands_metrics_on() -> None:
    # `make test` itself hands its flags on to what it starts.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "METRICS")}

    def would(*words: str) -> str:
        # VENV's mark is old or new, which is none of this test's business.
        made = ["make", "--dry-run", "--old-file=.venv/.ready", "cluster", *words]
        done = subprocess.run(made, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()[-1]

    assert would().endswith("jobs/cluster.py up")
    assert would("METRICS=0").endswith("jobs/cluster.py up")
    assert would("METRICS=1").endswith("jobs/cluster.py up --metrics")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="infra/monitoring/install.sh installs Prometheus")
def test_all_targets_are_up_and_all_that_was_started_is_the_owners_alone(tmp_path: Path) -> None:
    try:
        done = run_job(["cluster", "up", "--metrics", *PORTS], environment(), tmp_path)
        assert done.returncode == 0, said(done)
        parts = {one.name: one for one in running(tmp_path / ".cluster")}
        deadline, targets = time.monotonic() + 180, list[dict[str, Any]]()
        while not _healthy(targets):
            assert time.monotonic() < deadline, targets
            time.sleep(1)
            found = requests.get(f"{parts['prometheus'].url}/api/v1/targets", timeout=10).json()
            targets = found["data"]["activeTargets"]
        assert requests.get(f"{parts['prometheus'].url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        for one in parts.values():
            _all_known(one)
        (files,) = [word for word in psutil.Process(parts["ray"].pid).cmdline() if word.startswith("--temp-dir=")]
        above = Path(files.partition("=")[2]).parent
        assert stat.S_IMODE(above.stat().st_mode) == 0o700
        assert above.stat().st_uid == os.geteuid()
    finally:
        down = run_job(["cluster", "down"], environment(), tmp_path)
    assert down.returncode == 0, said(down)


def _healthy(targets: list[dict[str, Any]]) -> bool:
    jobs = {one["labels"]["job"] for one in targets}
    return jobs == {"ray", "pushgateway"} and all(one["health"] == "up" for one in targets)


def _all_known(one: Any) -> None:
    """What a part has started would be found without it."""
    children = set(psutil.Process(one.pid).children(recursive=True))
    left = {child for child in children - set(one.rest()) if child.is_running()}
    assert not left, [(child.name(), child.cmdline()[:3]) for child in left]
