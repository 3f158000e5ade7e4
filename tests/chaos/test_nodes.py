"""Several nodes on this machine, one of which is lost, or about to go, in the midst of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster as Nodes

from tests.services.conftest import REPOSITORY, Tracking, environment, kill_group, until

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(900)]

NODE = {"num_cpus": 2, "object_store_memory": 150_000_000}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A head that is too small for a worker, and two nodes that have room for one each."""
    head = {"num_cpus": 1, "object_store_memory": 300_000_000, "include_dashboard": True}
    cluster = Nodes(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


class Driver:
    """A training run that goes on beside the test."""

    def __init__(self, home: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self._home, self._process, self._log = home, process, log

    @property
    def text(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text()

    def until(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """Wait until it prints what matches."""

        def ready() -> bool:
            found = re.search(pattern, self.text)
            assert found or self._process.poll() is None, f"it ended without {pattern}:\n{self.text[-6000:]}"
            return found is not None

        until(ready, seconds)
        found = re.search(pattern, self.text)
        assert found
        return found

    def end(self, seconds: float = 500) -> None:
        """Wait until it succeeds."""
        assert self._process.wait(seconds) == 0, self.text[-6000:]

    @property
    def workers(self) -> list[int]:
        """How many each group of workers had."""
        (run,) = (self._home / "outputs").glob("smoke-*")
        (attempt,) = json.loads((run / "goodput.json").read_text())["attempts"]
        return attempt["workers"]


@contextmanager
def driver(nodes: Nodes, tracking: Tracking, data: Path, home: Path, *words: str) -> Iterator[Driver]:
    """`jobs/train.py smoke` on these nodes."""
    command: Sequence[str] = (
        *(sys.executable, str(REPOSITORY / "jobs" / "train.py"), "smoke", "--data", str(data)),
        *(
            "--address",
            nodes.address,
            "--tracking",
            tracking.uri,
            "--experiment",
            "nodes",
            "--worker_cpus",
            "1.5",
            *words,
        ),
    )
    log = home / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=home, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Driver(home, process, log)
    finally:
        kill_group(process)


def test_a_lost_node_shrinks_the_run_and_its_return_grows_it(
    nodes: Nodes, mlflow_server: Tracking, grid_data: Path, tmp_path: Path
) -> None:
    steps = 1500
    words = ("--flam_stage.steps", str(steps - 20), "--checkpoint_every", "50", "--workers", "1:2")
    with driver(nodes, mlflow_server, grid_data, tmp_path, *words, "--chaos", "node-loss@60,slow:0") as run:
        run.until(r"chaos: node-loss@60 in step 60")
        run.until(r"resumed at step 50 of")
        nodes.add_node(**NODE)
        run.end()
        assert run.workers == [2, 1, 2]
        assert f"step {steps}/{steps}" in run.text


def test_a_node_that_is_about_to_go_is_left_in_time(
    nodes: Nodes, mlflow_server: Tracking, grid_data: Path, tmp_path: Path
) -> None:
    """Ray is told of it, as an autoscaler does when a spot instance is reclaimed; no checkpoint would be due."""
    words = ("--flam_stage.steps", "580", "--checkpoint_every", "600", "--workers", "1", "--chaos", "slow:0")
    with driver(nodes, mlflow_server, grid_data, tmp_path, *words) as run:
        run.until(r"step 50/600")
        pid = int(run.until(r"RayTrainWorker pid=(\d+)")[1])
        raylet = psutil.Process(pid).ppid()
        (node,) = [one for one in nodes.worker_nodes if one.all_processes["raylet"][0].process.pid == raylet]
        drained = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("ray")), "drain-node", "--address", nodes.address),
                *("--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
                *("--reason-message", "reclaimed", "--deadline-remaining-seconds", "60"),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert drained.returncode == 0, drained.stderr
        assert int(run.until(r"resumed at step (\d+) of 600, lost 0\.0 s")[1]) > 50
        nodes.remove_node(node, allow_graceful=False)  # nobody is there any more
        run.end()
        assert run.workers == [1, 1]
        assert run.text.count("resumed at step") == 1
