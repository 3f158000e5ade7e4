"""Storage against Ceph's S3 gateway, which checks signatures, owners and policies as stores in production do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.ingest import IngestOptions, ingest_world
from flam_core.data.manifest import read_manifest
from flam_core.data.shard import decode_clip, read_row_group, verify_shard
from flam_core.errors import DataError, EnvironmentFault
from flam_core.worlds.base import Episode
from flam_core.worlds.grid import GridWorld
from services.storage import Location, download, exists, read_bytes, resolve, write_bytes
from tests.services.conftest import environment, run_job, said
from tests.services.rgw_fixture import GRID_WORLD as WORLD
from tests.services.rgw_fixture import INGEST, Gateway, objects, put, use

pytestmark = pytest.mark.rgw
pytest_plugins = ("tests.services.rgw_fixture",)

FS = LocalFileSystem()


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


def files(folder: Path) -> dict[str, bytes]:
    """The same of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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
