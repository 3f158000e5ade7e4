"""Storage against Ceph's S3 gateway, which checks signatures, owners and policies as stores in production do."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow.fs import FileSelector, LocalFileSystem

from flam_core.data.ingest import IngestOptions, ingest_world
from flam_core.data.manifest import read_manifest
from flam_core.data.shard import decode_clip, read_row_group, verify_shard
from flam_core.errors import DataError, EnvironmentFault
from flam_core.learning.trainer import TrainState
from flam_core.worlds.base import Episode
from flam_core.worlds.grid import GridWorld
from services.storage import Location, download, exists, read_bytes, resolve, write_bytes
from services.training import checkpoints
from tests.services.conftest import environment, free_ports, run_job, said
from tests.services.rgw_fixture import Gateway, missing_programs, running_gateway

pytestmark = pytest.mark.rgw

FS = LocalFileSystem()
WORLD = GridWorld(agents=2, frame_size=32)
INGEST = ("ingest", "--world", "grid", "--size", "32", "--episodes", "4", "--frames", "20")
SECONDS = 30
"""A storage that cannot be used is known as such within this time."""


@dataclass(frozen=True)
class NoiseWorld:
    """Frames that no codec makes smaller; `fail_at` raises in that episode."""

    fail_at: int = -1
    name: str = "noise"
    licence: str = "MIT"
    fps: float = 5.0
    frame_size: int = 64

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        rng = np.random.default_rng(seed)
        for index, episode in enumerate(GridWorld(agents=1, frame_size=64).episodes(count, frames, seed)):
            if index == self.fail_at:
                raise OSError("the disk is on fire")
            yield replace(episode, frames=rng.integers(0, 256, episode.frames.shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """A running gateway."""
    if missing := missing_programs():
        pytest.skip(f"Ceph is not installed ({', '.join(missing)}): run infra/rgw/install.sh")
    with running_gateway() as running:
        yield running


@pytest.fixture
def place(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A prefix in a new bucket of the owner's, whose keys are in the environment."""
    use(monkeypatch, gateway.environment(gateway.owner))
    return resolve(f"s3://{gateway.make_bucket()}/sets/a")


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Put `variables` into the environment, and out of it what would lead elsewhere."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def objects(place: Location) -> dict[str, bytes]:
    """Name below `place` and content of each object."""
    listed = place.fs.get_file_info(FileSelector(place.path, recursive=True, allow_not_found=True))
    names = [info.path.removeprefix(f"{place.path}/") for info in listed if info.is_file]
    return {name: read_bytes(place / name) for name in names}


def files(folder: Path) -> dict[str, bytes]:
    """The same of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def put(gateway: Gateway, place: Location, content: bytes) -> None:
    """Write an object behind flam's back."""
    bucket, _, key = place.path.partition("/")
    gateway.client(gateway.owner).put_object(Bucket=bucket, Key=key, Body=content)


def parts(gateway: Gateway, place: Location) -> int:
    """The number of parts an object was uploaded in, as its ETag says."""
    bucket, _, key = place.path.partition("/")
    tag = gateway.client(gateway.owner).head_object(Bucket=bucket, Key=key)["ETag"].strip('"')
    return int(tag.partition("-")[2] or 1)


# Data sets


def test_a_data_set_comes_back_byte_for_byte(gateway: Gateway, place: Location, tmp_path: Path) -> None:
    options = IngestOptions(clip_frames=20, row_group_clips=2, shard_bytes=20_000)
    remote = ingest_world(WORLD, place.fs, place.path, episodes=12, frames=40, options=options)
    local = ingest_world(WORLD, FS, f"{tmp_path}/a", episodes=12, frames=40, options=options)
    assert len(remote.manifest.shards) > 3
    assert remote.manifest == local.manifest == read_manifest(place.fs, place.path)
    assert objects(place) == files(tmp_path / "a")
    for shard in remote.manifest.shards:
        verify_shard(place.fs, place.path, shard)
        for group in range(len(shard.row_groups)):
            here = read_row_group(FS, f"{tmp_path}/a/{shard.name}", group).to_pylist()
            there = read_row_group(place.fs, f"{place.path}/{shard.name}", group).to_pylist()
            for row, same in zip(there, here, strict=True):
                np.testing.assert_array_equal(decode_clip(row, shard.name), decode_clip(same, shard.name))
    copy = download(place, [shard.name for shard in remote.manifest.shards], tmp_path / "copy")
    assert all(files(copy)[shard.name] == files(tmp_path / "a")[shard.name] for shard in remote.manifest.shards)

    ingest_world(WORLD, place.fs, place.path, episodes=12, frames=40, options=options)  # again: nothing changes
    assert objects(place) == files(tmp_path / "a")
    with pytest.raises(DataError, match="another data set is at"):
        ingest_world(WORLD, place.fs, place.path, episodes=6, frames=40, options=options)
    ingest_world(WORLD, place.fs, place.path, episodes=6, frames=40, options=replace(options, overwrite=True))
    names = {shard.name for shard in read_manifest(place.fs, place.path).shards}
    assert set(objects(place)) == {"manifest.json", "quarantine.json", *names}


def test_a_shard_of_many_parts(gateway: Gateway, place: Location) -> None:
    report = ingest_world(NoiseWorld(), place.fs, place.path, episodes=10, frames=192)
    (shard,) = report.manifest.split("train")
    assert shard.bytes > 16 << 20
    verify_shard(place.fs, place.path, shard)
    table = read_row_group(place.fs, f"{place.path}/{shard.name}", len(shard.row_groups) - 1)
    assert [decode_clip(row, shard.name).shape[0] for row in table.to_pylist()] == [*shard.clip_frames][-len(table) :]


def test_a_failed_ingest_leaves_nothing(gateway: Gateway, place: Location) -> None:
    with pytest.raises(EnvironmentFault, match="the disk is on fire"):
        ingest_world(
            NoiseWorld(fail_at=6),
            place.fs,
            place.path,
            episodes=8,
            frames=64,
            options=IngestOptions(
                row_group_clips=1, codec="zstd"
            ),  # else the first ones are read before any is written
        )
    bucket = place.path.partition("/")[0]
    assert not objects(Location(place.fs, bucket, f"s3://{bucket}"))
    uploads = gateway.client(gateway.owner).list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert not uploads, "parts of an unfinished upload are kept, and paid for"


@pytest.mark.parametrize("change", ["one byte", "shorter", "gone"])
def test_a_changed_shard_is_found(gateway: Gateway, place: Location, change: str) -> None:
    manifest = ingest_world(WORLD, place.fs, place.path, episodes=4, frames=40).manifest
    shard, other = manifest.shards[0], manifest.shards[1]
    where = place / shard.name
    content = bytearray(read_bytes(where))
    content[len(content) // 2] ^= 1
    if change == "gone":
        place.fs.delete_file(where.path)
    else:
        put(gateway, where, bytes(content if change == "one byte" else content[:-1]))
    said_of_it = {"one byte": "has changed: its sha256", "shorter": "the manifest says", "gone": "is missing"}
    with pytest.raises(DataError, match=said_of_it[change]) as caught:
        verify_shard(place.fs, place.path, shard)
    assert shard.name in str(caught.value)
    verify_shard(place.fs, place.path, other)


# Objects


def test_an_object_of_many_parts(gateway: Gateway, place: Location) -> None:
    content = np.random.default_rng(0).bytes((24 << 20) + 7)
    write_bytes(place / "whole", content)
    with place.fs.open_output_stream((place / "pieces").path) as stream:
        for start in range(0, len(content), 1_234_567):
            stream.write(content[start : start + 1_234_567])
    for name in ("whole", "pieces"):
        assert parts(gateway, place / name) > 1
        assert read_bytes(place / name) == content
        with place.fs.open_input_file((place / name).path) as file:
            file.seek((10 << 20) - 100)  # over the edge of a part
            assert file.read(200) == content[(10 << 20) - 100 : (10 << 20) + 100]
    write_bytes(place / "whole", b"short")
    assert read_bytes(place / "whole") == b"short"


def test_an_upload_is_not_seen_before_it_is_complete(place: Location) -> None:
    write_bytes(place / "old", b"before")
    for name in ("old", "new"):
        stream = place.fs.open_output_stream((place / name).path)
        stream.write(bytes(12 << 20))
        assert exists(place / "old")
        assert not exists(place / "new")
        assert read_bytes(place / "old") == b"before"
        if name == "old":
            stream.close()
            assert len(read_bytes(place / "old")) == 12 << 20
            write_bytes(place / "old", b"before")
    stream.close()
    assert exists(place / "new")


def test_names_of_all_kinds(place: Location) -> None:
    for name in ("a b", "a+b", "a%2Fb", "ü", "a=1,b=2", "x" * 200):
        write_bytes(place / name, name.encode())
    assert objects(place) == {name: name.encode() for name in ("a b", "a+b", "a%2Fb", "ü", "a=1,b=2", "x" * 200)}


def test_a_missing_object(place: Location) -> None:
    assert not exists(place / "none")
    with pytest.raises(DataError, match="none is missing"):
        read_bytes(place / "none")


# What forbids, what is not there, what does not answer


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


@pytest.mark.parametrize("size", [1, 9 << 20])
def test_checksums_asked_for_do_no_harm(
    gateway: Gateway, place: Location, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Neither as one request nor in parts; the store refuses those that clients send unasked (HTTP 411)."""
    use(monkeypatch, gateway.environment(gateway.owner, AWS_REQUEST_CHECKSUM_CALCULATION="when_supported"))
    content = np.random.default_rng(0).bytes(size)
    write_bytes(resolve(place.uri) / "a", content)
    assert read_bytes(place / "a") == content


def test_ingest_needs_no_more_than_endpoint_and_keys(gateway: Gateway, tmp_path: Path) -> None:
    address = f"s3://{gateway.make_bucket()}/grid"
    variables = gateway.environment(gateway.owner)
    few = {name: variables[name] for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    done = run_job([*INGEST, "--out", address], environment(**few), tmp_path)
    assert done.returncode == 0, said(done)
    assert address in done.stdout
    again = run_job([*INGEST, "--seed", "1", "--out", address], environment(**few), tmp_path)
    assert again.returncode == 4, said(again)
    assert "another data set is at" in again.stderr


# Checkpoints


def save(run: Location, step: int) -> None:
    checkpoints.save(run, state(step))


def state(step: int) -> TrainState:
    return TrainState(b"model %d" % step, b"optimizer %d" % step, None, {"step": step, "loss": 0.5})


def test_checkpoints(place: Location) -> None:
    assert checkpoints.newest(place) is None
    assert checkpoints.newest_step(place) == 0
    for step in (10, 20, 30):
        save(place, step)
        assert checkpoints.newest_step(place) == step
    found = checkpoints.newest(place)
    assert found == state(30)
    assert {name.split("/")[1] for name in objects(place)} == {"index.json", "step-00000020", "step-00000030"}
    save(place, 30)  # a step taken again after a restart
    assert checkpoints.newest(place) == found
    large = np.random.default_rng(1).bytes(18 << 20)
    checkpoints.save(place, TrainState(large, large[::-1], b"mean", {"step": 40}))
    assert checkpoints.newest(place) == TrainState(large, large[::-1], b"mean", {"step": 40})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("COMMIT", None),
        ("COMMIT", b'{"model.safetens'),
        ("model.safetensors", None),
        ("model.safetensors", b"model"),
        ("optimizer.pt", b""),
        ("meta.json", b'{"step": 31}'),
    ],
)
def test_a_torn_newest_checkpoint_is_passed_over(
    gateway: Gateway, place: Location, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (20, 30):
        save(place, step)
    torn = place / f"checkpoints/step-00000030/{name}"
    if content is None:
        place.fs.delete_file(torn.path)
    else:
        put(gateway, torn, content)
    found = checkpoints.newest(place)
    assert found == state(20)
    assert "step-00000030" in capsys.readouterr().out
    save(place, 30)  # the run goes on from 20 and comes by again
    found = checkpoints.newest(place)
    assert found == state(30)


def test_a_checkpoint_without_a_place_in_the_index_is_none(place: Location) -> None:
    save(place, 20)
    index = read_bytes(place / "checkpoints/index.json")
    save(place, 30)
    write_bytes(place / "checkpoints/index.json", index)  # as if killed just before
    found = checkpoints.newest(place)
    assert found == state(20)


def test_checkpoints_of_a_lost_storage_are_not_taken_for_none(
    gateway: Gateway, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(place, 20)
    for variables in (
        gateway.environment(gateway.owner, AWS_SECRET_ACCESS_KEY="wrong"),
        gateway.environment(gateway.owner, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_ports(1)[0]}"),
    ):
        use(monkeypatch, variables | {"FLAM_STORAGE_RETRY_SECONDS": "2"})
        lost = resolve(place.uri, check=False)
        for ask in (checkpoints.newest, checkpoints.newest_step):
            with pytest.raises(EnvironmentFault):
                ask(lost)
