"""The manifest: what it accepts, what it refuses, and that its bytes are its identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import MANIFEST_NAME, SPLITS, Manifest, Shard, read_manifest, write_manifest
from flam_core.errors import DataError


def shard(split: str, index: int = 0) -> Shard:
    return Shard(
        name=f"shards/{split}-{index:05d}.parquet",
        split=split,
        bytes=1000,
        sha256="ab" * 32,
        clips=3,
        frames=10,
        clip_frames=(4, 4, 2),
        row_groups=(2, 1),
    )


def manifest() -> Manifest:
    shards = tuple(shard(split) for split in SPLITS)
    return Manifest(
        name="grid",
        source="a grid",
        licence="Apache-2.0",
        settings={"seed": 0, "video.fps": None, "codec": "auto", "ratio": 0.5, "exact": True},
        codec="zstd",
        frame_size=(64, 48),
        fps=8.0,
        has_truth=True,
        episodes={"train": 2, "val": 1, "test": 1},
        clips=9,
        frames=30,
        shards=shards,
    )


def test_json_round_trip_keeps_every_field_and_type() -> None:
    before = manifest()
    after = Manifest.from_json(before.to_json())
    assert after == before
    assert after.to_json() == before.to_json()
    assert isinstance(after.shards[0].clip_frames, tuple)


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    fs = LocalFileSystem()
    write_manifest(fs, str(tmp_path), manifest())
    content = (tmp_path / MANIFEST_NAME).read_bytes()
    assert hashlib.sha256(content).hexdigest() == manifest().sha256
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]
    assert read_manifest(fs, str(tmp_path)) == manifest()


def test_sha256_depends_on_every_field() -> None:
    base = manifest()
    others = [
        replace(base, licence="MIT"),
        replace(base, fps=None),
        replace(base, settings={}),
        replace(base, name="b"),
        replace(base, codec="h264"),
    ]
    assert len({base.sha256, *(other.sha256 for other in others)}) == 6


def test_split_gives_its_shards() -> None:
    assert [part.name for part in manifest().split("val")] == ["shards/val-00000.parquet"]
    assert manifest().total_bytes == 3000
    with pytest.raises(DataError, match="no split 'training'"):
        manifest().split("training")


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no data set at {tmp_path}/none"):
        read_manifest(LocalFileSystem(), f"{tmp_path}/none")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(manifest().to_json()[:200])
    with pytest.raises(DataError, match=f"{tmp_path}/manifest.json: manifest: the file: Invalid JSON"):
        read_manifest(LocalFileSystem(), str(tmp_path))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("schema_version",), 3, "schema version 3"),
        (("codec",), "raw", "codec 'raw' is none of zstd, h264, h264-444, jpeg"),
        (("codec",), None, "codec: "),
        (("surprise",), 1, "surprise"),
        (("frames",), 31, "frames is not the sum"),
        (("frames",), "30", "frames: "),
        (("clips",), 8, "clips is not the sum"),
        (("clips",), True, "clips: "),
        (("name",), "a/b", "name 'a/b'"),
        (("frame_size",), [64], "frame_size"),
        (("frame_size",), [64, 0], "frame_size"),
        (("fps",), 0.0, "fps is 0.0"),
        (("episodes",), {"train": 3, "val": 1}, "episodes names"),
        (("episodes",), {"train": 3, "val": 1, "test": 0}, "a split is empty"),
        (("episodes",), {"train": 4, "val": 1, "test": 1}, "a split is empty"),
        (("settings",), {"a": [1]}, "settings"),
        (("shards", 0, "name"), "shards/../../secret.parquet", "its name"),
        (("shards", 0, "name"), "/etc/passwd", "its name"),
        (("shards", 0, "name"), "shards/val-00000.parquet", "share a name"),
        (("shards", 0, "split"), "holdout", "'holdout' is none of"),
        (("shards", 0, "bytes"), 0, "0 bytes"),
        (("shards", 0, "sha256"), "AB" * 32, "sha256"),
        (("shards", 0, "clips"), 4, "differ in number"),
        (("shards", 0, "clip_frames"), [4, 6, 0], "a clip has no frames"),
        (("shards", 0, "clip_frames"), [4, 4, 3], "sum of clip_frames"),
        (("shards", 0, "row_groups"), [3, 0], "a row group has no clips"),
        (("shards", 0, "row_groups"), [2, 2], "sum of row_groups"),
    ],
)
def test_what_does_not_agree_is_refused_in_one_line(where: tuple[str | int, ...], value: Any, message: str) -> None:
    content = json.loads(manifest().to_json())
    place = content
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(DataError) as caught:
        Manifest.from_json(json.dumps(content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("version", "fields"), [(1, {}), (3, {"colour": "rgb"})])
def test_another_version_is_named_whatever_fields_it_has(version: int, fields: dict[str, str]) -> None:
    content = json.loads(manifest().to_json()) | {"schema_version": version} | fields
    del content["codec"]
    with pytest.raises(DataError, match=f"schema version {version}, this flam reads version 2"):
        Manifest.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"schema_version": "1"}', '"schema_version"'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="The manifest is damaged or not flam's"):
        Manifest.from_json(text)


def test_a_missing_field_is_named() -> None:
    content = json.loads(manifest().to_json())
    del content["shards"][1]["sha256"]
    with pytest.raises(DataError, match=r"shards\.1\.sha256"):
        Manifest.from_json(json.dumps(content))
