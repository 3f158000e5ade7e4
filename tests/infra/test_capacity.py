"""Each job's cluster has from the start what its program asks for: flam does not wait for nodes that are not there."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest

from services.training.cluster import FEED_CPUS
from services.training.elastic import Workers, parse_workers
from tests.infra.kustomize import render

OVERLAYS = Path(__file__).resolve().parents[2] / "infra" / "kuberay" / "overlays"


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict[str, Any]]:
    """Specs of all RayJobs by overlay and name; tests must not change them."""
    return {
        f"{overlay} {one['metadata']['name']}": one["spec"]
        for overlay in ("small", "large")
        for one in render(OVERLAYS / overlay)
        if one["kind"] == "RayJob"
    }


def flag(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def workers_of(job: dict[str, Any]) -> tuple[Workers, bool]:
    """Of a run, or of the trials of a sweep that run together; whether each has a GPU."""
    words = shlex.split(job["entrypoint"])
    each, together = parse_workers(flag(words, "--workers", "1")), int(flag(words, "--at_a_time", "1"))
    return Workers(each.least * together, each.most * together), "--gpu" in words


def offers(job: dict[str, Any], replicas: str) -> dict[str, float]:
    """CPUs and GPUs of so many replicas of each group."""
    found = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for kind in found:
            found[kind] += group[replicas] * float(limits.get(kind, 0))
    return found


def lacking(job: dict[str, Any]) -> list[str]:
    """What a job would end with exit code 3 for."""
    workers, gpu = workers_of(job)
    said = []
    for replicas, needed in (
        ("replicas", workers.least),
        ("minReplicas", workers.least),
        ("maxReplicas", workers.most),
    ):
        has = offers(job, replicas)
        if gpu and has["nvidia.com/gpu"] < needed:
            said.append(f"{replicas}: {has['nvidia.com/gpu']:g} GPUs for {needed} workers")
        if has["cpu"] < needed + FEED_CPUS:
            said.append(f"{replicas}: {has['cpu']:g} CPUs for {needed} workers and the feed")
    return said


def test_jobs_have_what_they_ask_for(jobs: dict[str, dict[str, Any]]) -> None:
    assert len(jobs) == 4
    assert {name: said for name, job in jobs.items() if (said := lacking(job))} == {}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("--workers 2:8", "--workers 9:9", "replicas: 8 GPUs for 9 workers"),
        ("--workers 2:8", "--workers 2:17", "maxReplicas: 16 GPUs for 17 workers"),
        ("--gpu --workers 2:8", "--workers 199", "replicas: 112 CPUs for 199 workers and the feed"),
    ],
)
def test_what_is_lacking_is_found(jobs: dict[str, dict[str, Any]], old: str, new: str, said: str) -> None:
    job = copy.deepcopy(jobs["large flam-train"])
    assert old in job["entrypoint"]
    job["entrypoint"] = job["entrypoint"].replace(old, new)
    assert said in lacking(job)
