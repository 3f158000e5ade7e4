"""The Ray that a run starts for itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.conftest import environment, free_ports

ROOT = Path(__file__).resolve().parents[2]

_CONNECT = """
import ray
from services.training.cluster import connect
from services.training.settings import TrainSettings
assert connect(TrainSettings(data="data/none"))
print("nodes", len(ray.nodes()))
ray.shutdown()
"""


@pytest.mark.timeout(120)
def test_a_head_that_was_killed_on_this_machine_is_in_nobodys_way(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ray finds the latest cluster of a machine by a file, which stays where a head is killed."""
    temporary = tmp_path_factory.mktemp("r")
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_ports(1)[0]}")
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT],
        cwd=ROOT,
        env=environment(RAY_TMPDIR=str(temporary)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nodes 1" in done.stdout
