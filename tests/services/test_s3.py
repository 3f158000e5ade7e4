"""Data and runs in a bucket: everything a resume needs is there, nothing in the folder that the command ran in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from tests.services.conftest import (
    GRID,
    RESUME_SETTINGS,
    RESUME_STEPS,
    Cluster,
    Trained,
    environment,
    free_ports,
    kill_when,
    run_id_of,
    run_job,
    said,
    sha256,
    storage_environment,
)

pytestmark = pytest.mark.timeout(600)

ENVIRONMENT = 3


@dataclass(frozen=True)
class Bucket:
    """A bucket of the session's S3 server."""

    name: str

    def read(self, key: str) -> bytes | None:
        """An object's content, None if there is none."""
        client = boto3.client("s3")
        try:
            return client.get_object(Bucket=self.name, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def keys(self, prefix: str) -> set[str]:
        """What lies below a prefix."""
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        keys = {item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])}
        return {key for key in keys if key and not key.endswith("/")}  # some clients mark folders by empty objects

    def committed(self, run_id: str) -> list[int]:
        """The steps that the index of a run's checkpoints names."""
        index = self.read(f"runs/{run_id}/checkpoints/index.json")
        return json.loads(index)["steps"] if index else []


@pytest.fixture(scope="module")
def bucket(s3_server: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """A bucket with the data set `grid` in it."""
    name = s3_server()
    home = tmp_path_factory.mktemp("ingest-s3")
    arguments = ["ingest", *GRID, "--option", "cells=6", "--out", f"s3://{name}/datasets/grid"]
    done = run_job(arguments, environment(**storage_environment()), home)
    assert done.returncode == 0, said(done)
    assert not list(home.iterdir())
    return Bucket(name)


def test_ingest_into_a_bucket_is_ingest_into_a_folder(bucket: Bucket, grid_data: Path) -> None:
    local = {path.relative_to(grid_data).as_posix() for path in grid_data.rglob("*") if path.is_file()}
    assert bucket.keys("datasets/grid/") == local
    for name in local:
        content = bucket.read(f"datasets/grid/{name}")
        assert content is not None
        assert hashlib.sha256(content).hexdigest() == sha256(grid_data / name), name


@dataclass(frozen=True)
class InBucket:
    """A run with its storage in the bucket: killed, then resumed from another folder."""

    trained: Trained
    committed_at_kill: list[int]


@pytest.fixture(scope="module")
def resumed(
    bucket: Bucket, cluster: Cluster, unbroken_run: Trained, tmp_path_factory: pytest.TempPathFactory
) -> InBucket:
    """The unbroken run's twin in the bucket."""
    env = environment(**storage_environment())
    places = ("--storage", f"s3://{bucket.name}/runs")
    arguments = cluster.arguments(f"s3://{bucket.name}/datasets/grid", "bucket", *places, *RESUME_SETTINGS)
    run_id = unbroken_run.run_id  # the same settings and data: the same run
    first = tmp_path_factory.mktemp("bucket-first")
    kill_when(arguments, env, first, lambda: bool(bucket.committed(run_id)))
    committed = bucket.committed(run_id)
    second = tmp_path_factory.mktemp("bucket-second")
    done = run_job(arguments, env, second)
    assert done.returncode == 0, said(done)
    return InBucket(Trained(second, "bucket", run_id_of(done.stdout), tuple(arguments), done), committed)


@pytest.mark.slow
def test_run_is_resumed_from_the_bucket(resumed: InBucket, bucket: Bucket) -> None:
    text = resumed.trained.done.stdout
    assert re.findall(r"resumed at step (\d+) of", text) == [str(max(resumed.committed_at_kill))]
    assert bucket.committed(resumed.trained.run_id) == [RESUME_STEPS - 50, RESUME_STEPS]


@pytest.mark.slow
def test_bucket_holds_checkpoints_report_and_model(resumed: InBucket, bucket: Bucket) -> None:
    keys = bucket.keys(f"runs/{resumed.trained.run_id}/")
    for step in (RESUME_STEPS - 50, RESUME_STEPS):
        names = ("COMMIT", "meta.json", "model.safetensors", "optimizer.pt")
        assert {f"checkpoints/step-{step:08d}/{name}" for name in names} <= keys
    assert {"config.json", "report.html", "metrics.json", "rollout.png", "rollout.gif"} <= keys
    assert {"model/model.safetensors", "model/config.json", "model/README.md"} <= keys
    old = {key for key in keys if key.startswith("checkpoints/step-") and int(key[17:25]) < RESUME_STEPS - 50}
    assert not old


@pytest.mark.slow
def test_weights_are_those_of_the_unbroken_local_run(resumed: InBucket, bucket: Bucket, unbroken_run: Trained) -> None:
    assert resumed.trained.run_id == unbroken_run.run_id
    content = bucket.read(f"runs/{resumed.trained.run_id}/model/model.safetensors")
    assert content is not None
    assert hashlib.sha256(content).hexdigest() == unbroken_run.weights == resumed.trained.weights


@pytest.mark.slow
def test_mlflow_names_the_bucket(resumed: InBucket, bucket: Bucket, cluster: Cluster) -> None:
    run = cluster.tracking.run(resumed.trained.run_id, "bucket")
    assert run.info.status == "FINISHED"
    assert run.data.tags["run_folder"] == f"s3://{bucket.name}/runs/{resumed.trained.run_id}"
    assert [step for step, _ in cluster.tracking.history(run)["progress/step"]] == [50, 100, 150, 200, 250]


def refuse(home: Path, arguments: list[str], *parts: str, **variables: str) -> None:
    """Exit 3, one line with all of `parts`, nothing left behind."""
    done = run_job(arguments, environment(**{**storage_environment(), **variables}), home, seconds=120)
    assert done.returncode == ENVIRONMENT, said(done)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, said(done)
    assert lines[0].startswith("flam: error: ")
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    assert not list(home.iterdir())


@pytest.mark.parametrize("where", ["data", "storage", "ingest"])
def test_wrong_bucket(bucket: Bucket, grid_data: Path, tmp_path: Path, where: str) -> None:
    address = "s3://no-such-bucket-of-flam/x"
    if where == "ingest":
        arguments = ["ingest", *GRID, "--option", "cells=6", "--out", address]
    else:
        arguments = ["train", "smoke", f"--{where}", address]
        arguments += ["--data", str(grid_data)] if where == "storage" else []
    refuse(tmp_path, arguments, "bucket no-such-bucket-of-flam", address, "does not exist", "Create it")


@pytest.mark.parametrize("where", ["data", "storage", "ingest"])
def test_unreachable_endpoint(bucket: Bucket, grid_data: Path, tmp_path: Path, where: str) -> None:
    endpoint, address = f"http://127.0.0.1:{free_ports(1)[0]}", f"s3://{bucket.name}/datasets/grid"
    if where == "ingest":
        arguments = ["ingest", *GRID, "--option", "cells=6", "--out", address]
    else:
        arguments = ["train", "smoke", f"--{where}", address]
        arguments += ["--data", str(grid_data)] if where == "storage" else []
    refuse(tmp_path, arguments, endpoint, "cannot be reached", "AWS_ENDPOINT_URL", AWS_ENDPOINT_URL=endpoint)
