"""A store that refuses, is not there or does not answer is known as such, in time and by name (Ceph's S3 gateway)."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flam_core.data.ingest import ingest_world
from flam_core.data.manifest import read_manifest
from flam_core.data.shard import verify_shard
from flam_core.errors import EnvironmentFault
from flam_core.learning.state import TrainState
from services.storage import Location, exists, read_bytes, resolve, write_bytes
from services.training import checkpoints
from tests.services.conftest import environment, free_ports, run_job, said
from tests.services.rgw_fixture import GRID_WORLD as WORLD
from tests.services.rgw_fixture import INGEST, Gateway, objects, use

pytestmark = pytest.mark.rgw
pytest_plugins = ("tests.services.rgw_fixture",)

SECONDS = 30
"""A storage that cannot be used is known as such within this time."""


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refused(gateway: Gateway, case: str, bucket: str) -> tuple[dict[str, str], str, str]:
    """The environment, the address, and what the message must say."""
    (closed,) = free_ports(1)
    owner, address = gateway.owner, f"s3://{bucket}/sets/a"
    return {
        "wrong secret": (gateway.environment(owner, AWS_SECRET_ACCESS_KEY="wrong"), address, "forbids access to"),
        "unknown key": (gateway.environment(owner, AWS_ACCESS_KEY_ID="NOBODY"), address, "forbids access to"),
        "another's bucket": (gateway.environment(gateway.stranger), address, "forbids access to"),
        "no bucket": (gateway.environment(owner), "s3://none-such-403/a", "none-such-403 of .* does not exist at"),
        "nobody listens": (
            gateway.environment(owner, AWS_ENDPOINT_URL=f"http://127.0.0.1:{closed}"),
            "s3://runs-403/forbidden",  # its name must not mislead
            "cannot be reached for",
        ),
        "no TLS": (
            gateway.environment(owner, AWS_ENDPOINT_URL=gateway.endpoint.replace("http:", "https:")),
            address,
            "cannot be reached for",
        ),
    }[case]


CASES = ["wrong secret", "unknown key", "another's bucket", "no bucket", "nobody listens", "no TLS"]


@pytest.mark.parametrize("case", CASES)
def test_a_storage_that_cannot_be_used(
    gateway: Gateway, place: Location, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(place / "there", b"1")
    variables, address, message = refused(gateway, case, place.path.partition("/")[0])
    use(monkeypatch, variables | {"FLAM_STORAGE_RETRY_SECONDS": "2"})
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match=message) as caught:
        resolve(address)
    assert address in str(caught.value)
    location = resolve(address, check=False)
    with pytest.raises(EnvironmentFault, match=message):
        write_bytes(location / "step-00000403", b"2")
    if case != "no bucket":  # there, an object is just missing
        for ask in (exists, read_bytes):
            with pytest.raises(EnvironmentFault, match=message):
                ask(location / "there")
        with pytest.raises(EnvironmentFault, match="cannot read"):
            read_manifest(location.fs, location.path)
    with pytest.raises(EnvironmentFault, match=r"cannot (look at|write the data set at)"):
        ingest_world(WORLD, location.fs, location.path, episodes=3, frames=20)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("case", CASES)
def test_ingest_says_it_in_one_line(gateway: Gateway, case: str, tmp_path: Path) -> None:
    variables, address, message = refused(gateway, case, gateway.make_bucket())
    started = time.monotonic()
    done = run_job([*INGEST, "--out", address], environment(**variables), tmp_path)
    assert time.monotonic() - started < SECONDS
    assert done.returncode == 3, said(done)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("flam: error: ")
    assert re.search(message, line), line
    assert address in line


def test_a_storage_that_hangs_is_known_in_time(monkeypatch: pytest.MonkeyPatch, gateway: Gateway) -> None:
    with silent_server() as endpoint:
        use(monkeypatch, gateway.environment(gateway.owner, AWS_ENDPOINT_URL=endpoint))
        started = time.monotonic()
        with pytest.raises(EnvironmentFault, match="cannot be reached for s3://runs/a"):
            resolve("s3://runs/a")
        assert time.monotonic() - started < SECONDS


def test_a_bucket_that_may_only_be_read(
    gateway: Gateway, place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = ingest_world(WORLD, place.fs, place.path, episodes=4, frames=20).manifest
    bucket = place.path.partition("/")[0]
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"AWS": [f"arn:aws:iam:::user/{gateway.stranger.name}"]},
                "Action": ["s3:ListBucket", "s3:GetObject"],
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
            }
        ],
    }
    gateway.client(gateway.owner).put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    before = objects(place)

    use(monkeypatch, gateway.environment(gateway.stranger))
    lent = resolve(place.uri)
    assert read_manifest(lent.fs, lent.path) == manifest
    for shard in manifest.shards:
        verify_shard(lent.fs, lent.path, shard)
    with pytest.raises(EnvironmentFault, match="forbids access to"):
        write_bytes(lent / "mine", b"1")
    with pytest.raises(EnvironmentFault, match="forbids access to"):
        checkpoints.save(lent / "run", TrainState(b"m", b"o", None, {"step": 10}))
    done = run_job(
        [*INGEST, "--out", f"s3://{bucket}/new"], environment(**gateway.environment(gateway.stranger)), tmp_path
    )
    assert done.returncode == 3, said(done)
    assert "cannot write the data set at" in done.stderr
    assert "ACCESS_DENIED" in done.stderr
    use(monkeypatch, gateway.environment(gateway.owner))
    assert objects(place) == before
    assert not objects(resolve(f"s3://{bucket}/new"))
