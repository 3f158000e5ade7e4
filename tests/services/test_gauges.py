"""The numbers of a run where Prometheus reads them: on the metrics port of a real Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from flam_core.learning.collapse import FindingName
from services.watch.beats import BUCKETS
from services.watch.gauges import HEALTH, SPEED, exported
from tests.services.conftest import REPOSITORY, RayHead, environment

RUN = "gauges-1a2b3c4d"
SET = f"""
import sys
import ray
from flam_core.learning.collapse import FindingName
from services.watch.beats import BUCKETS
from services.watch.gauges import HEALTH, SPEED, Gauges

@ray.remote
class Rank0:
    def log(self):
        self.gauges = Gauges("{RUN}", 0)
        self.gauges.set({{name: float(at) for at, name in enumerate((*HEALTH, *SPEED), start=1)}})
        self.gauges.set_findings({{FindingName.PLATEAU, FindingName.IDLE_ACTIONS}})
        self.gauges.set_findings({{FindingName.PLATEAU}})  # the other has ended

ray.init(address=sys.argv[1], runtime_env={{"env_vars": {{"PYTHONPATH": {str(REPOSITORY)!r}}}}}, log_to_driver=False)
rank = Rank0.remote()
ray.get(rank.log.remote())
Gauges("{RUN}").set_goodput({{bucket: 10.0 + at for at, bucket in enumerate(BUCKETS)}})
sys.stdin.read()  # until it has been looked at: what a process showed goes when it does
"""
"""A driver with its goodput, and a worker with a log line."""


def shown(page: str) -> dict[tuple[str, str], tuple[float, dict[str, str]]]:
    """By name, and finding or bucket: value and labels. Of this run alone."""
    return {
        (one.name, one.labels.get("finding") or one.labels.get("bucket") or ""): (one.value, one.labels)
        for family in text_string_to_metric_families(page)
        for one in family.samples
        if one.labels.get("flam_run") == RUN
    }


@pytest.mark.timeout(180)
def test_prometheus_reads_what_a_run_says(ray_head: RayHead) -> None:
    wanted: dict[tuple[str, str], float] = {}
    for at, name in enumerate((*HEALTH, *SPEED), start=1):
        wanted[f"ray_{exported(name)}", ""] = float(at)
    for name in FindingName:
        wanted["ray_flam_collapse", name.value] = float(name is FindingName.PLATEAU)
    for at, bucket in enumerate(BUCKETS):
        wanted["ray_flam_goodput_seconds", bucket] = 10.0 + at
    run = subprocess.Popen(
        [sys.executable, "-c", SET, ray_head.address],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    found: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
    values: dict[tuple[str, str], float] = {}
    try:
        deadline = time.monotonic() + 120
        while values != wanted and time.monotonic() < deadline and run.poll() is None:
            with suppress(requests.RequestException):
                found = shown(requests.get(ray_head.metrics, timeout=5, proxies={"http": ""}).text)
            values = {key: value for key, (value, _) in found.items()}
            time.sleep(0.5)
    finally:
        _, said = run.communicate("", timeout=60)
    assert values == wanted, said[-2000:]
    for (name, _), (_, labels) in found.items():
        assert labels.get("rank") == (None if name == "ray_flam_goodput_seconds" else "0")
