"""Several nodes on this machine, one of which is lost in the midst of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as Nodes

from tests.services.conftest import REPOSITORY, Tracking, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A head that is too small for a worker, and two nodes of one CPU."""
    cluster = Nodes(
        initialize_head=True,
        head_node_args={"num_cpus": 0.9, "object_store_memory": 300_000_000, "include_dashboard": True},
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=150_000_000)
        yield cluster
    finally:
        cluster.shutdown()


def test_a_lost_node_shrinks_the_run_and_its_return_grows_it(
    nodes: Nodes, mlflow_server: Tracking, grid_data: Path, tmp_path: Path
) -> None:
    steps = 1500
    command = [
        *(sys.executable, str(REPOSITORY / "jobs" / "train.py"), "smoke", "--data", str(grid_data)),
        *("--address", nodes.address, "--tracking", mlflow_server.uri, "--experiment", "nodes"),
        *("--flam_stage.steps", str(steps - 20), "--checkpoint_every", "50", "--workers", "1:2"),
        *("--chaos", "node-loss@60,slow:0"),
    ]
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        driver = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 800
        added = False
        while driver.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            if not added and len(re.findall(r"resumed at step", log.read_text())) == 1:
                nodes.add_node(num_cpus=1, object_store_memory=150_000_000)
                added = True
            time.sleep(1.0)
    finally:
        driver.kill()
        driver.wait()
    text = log.read_text()
    assert driver.returncode == 0, text[-6000:]
    (run,) = (tmp_path / "outputs").glob("smoke-*")
    (attempt,) = json.loads((run / "goodput.json").read_text())["attempts"]
    assert attempt["workers"] == [2, 1, 2], attempt
    assert f"step {steps}/{steps}" in text
