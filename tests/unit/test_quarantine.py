"""The quarantine file: one text for one content, read with care, and a plan's rows and shares from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import QUARANTINE_NAME, Manifest, Shard
from flam_core.data.quarantine import BadClip, BadSource, Quarantine, read_quarantine, write_quarantine
from flam_core.errors import DataError, EnvironmentFault, SettingsError

FS = LocalFileSystem()


def shard(index: int, clips: int = 50) -> Shard:
    return Shard(
        name=f"shards/train-{index:05d}.parquet",
        split="train",
        bytes=1000,
        sha256="0" * 64,
        clips=clips,
        frames=clips * 8,
        clip_frames=(8,) * clips,
        row_groups=(clips,),
    )


def manifest(shards: int = 4) -> Manifest:
    held_out = [
        replace(shard(90 + i, 1), name=f"shards/{split}.parquet", split=split)
        for i, split in enumerate(("val", "test"))
    ]
    parts = (*(shard(i) for i in range(shards)), *held_out)
    return Manifest(
        name="test",
        source="test",
        licence="MIT",
        settings={},
        codec="zstd",
        frame_size=(8, 8),
        fps=5.0,
        has_truth=False,
        episodes={"train": 10, "val": 1, "test": 1},
        clips=sum(part.clips for part in parts),
        frames=sum(part.frames for part in parts),
        shards=parts,
    )


def bad(row: int | None, index: int = 0, reason: str = "is broken") -> BadClip:
    return BadClip(shard(index).name, row, None if row is None else f"episode {row}:0", reason)


texts = st.text(max_size=8)
entries = st.builds(bad, st.none() | st.integers(0, 49), st.integers(0, 3), texts)
sources = st.builds(BadSource, texts, texts)


@given(st.lists(entries), st.lists(sources), st.randoms())
def test_the_order_of_discovery_does_not_show(clips: list[BadClip], files: list[BadSource], random: Random) -> None:
    first = Quarantine(tuple(files), tuple(clips))
    clips, files = clips + clips[:1], files + files[:1]
    random.shuffle(clips)
    random.shuffle(files)
    shuffled = Quarantine(tuple(files), tuple(clips))
    assert first == shuffled
    assert first.to_json() == shuffled.to_json()
    assert first.sha256 == shuffled.sha256
    assert Quarantine.from_json(first.to_json()) == first


def test_the_text_is_fixed() -> None:
    quarantine = Quarantine((BadSource("ü.mp4", "no frames"),), (bad(3),))
    assert quarantine.to_json() == (
        b'{\n "clips": [\n  {\n   "clip": "episode 3:0",\n   "reason": "is broken",\n   "row": 3,\n'
        b'   "shard": "shards/train-00000.parquet"\n  }\n ],\n "schema_version": 1,\n'
        b' "sources": [\n  {\n   "path": "\\u00fc.mp4",\n   "reason": "no frames"\n  }\n ]\n}\n'
    )


def test_identity_is_what_is_left_out_and_not_why() -> None:
    assert Quarantine((BadSource("a", "b"),)).sha256 == ""
    one = Quarantine(clips=(bad(3),))
    assert len(one.sha256) == 64
    assert one.sha256 == Quarantine(clips=(bad(3, reason="other words"),), sources=(BadSource("a", "b"),)).sha256
    others = [Quarantine(clips=(bad(4),)), Quarantine(clips=(bad(3, 1),)), Quarantine(clips=(bad(None),))]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 4


def test_rows_and_share() -> None:
    of = manifest()
    quarantine = Quarantine(clips=(bad(3), bad(3, reason="again"), bad(7), bad(None, 1), bad(2, 1)))
    assert quarantine.rows(of.shards[0]) == {3, 7}
    assert quarantine.rows(of.shards[1]) == frozenset(range(50))
    assert quarantine.rows(of.shards[2]) == frozenset()
    assert quarantine.bad_clips(of) == 52
    assert quarantine.share(of) == 52 / 202


def test_check_allows_up_to_the_share() -> None:
    of = manifest()
    Quarantine().check(of, 0.0)
    two = Quarantine(clips=(bad(3), bad(7)))
    two.check(of)
    two.check(of, 2 / 202)
    with pytest.raises(
        DataError, match=r"2 of 202 clips bad \(0\.99%\), at most 0\.98% may be: shards/train-00000"
    ) as told:
        two.check(of, 1.98 / 202)
    assert "row 3 (episode 3:0): is broken; shards/train-00000.parquet, row 7 (episode 7:0): is broken." in str(
        told.value
    )
    assert "verify again" in told.value.fix
    with pytest.raises(DataError, match=r"3 of 202 clips bad \(1\.49%\), at most 1\.00% may be"):
        Quarantine(clips=(bad(3), bad(7), bad(9))).check(of)
    with pytest.raises(DataError, match=r"50 of 202 .*the whole shard: is broken"):
        Quarantine(clips=(bad(None),)).check(of)


def test_check_names_the_first_twenty() -> None:
    quarantine = Quarantine(clips=tuple(bad(row) for row in range(25)))
    with pytest.raises(DataError) as told:
        quarantine.check(manifest())
    assert told.value.what.count("is broken") == 20
    assert told.value.what.endswith("row 19 (episode 19:0): is broken; and 5 more")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("entry", "name"), [(bad(50), "row 50"), (bad(None, 7), "train-00007"), (bad(0, 7), "row 0")])
def test_check_refuses_what_the_manifest_has_not(entry: BadClip, name: str) -> None:
    with pytest.raises(DataError, match=f"names shard .*{name}.* which the manifest has not"):
        Quarantine(clips=(entry,)).check(manifest(), 1.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(SettingsError, match="max_bad_share"):
        Quarantine().check(manifest(), share)


def test_it_comes_back_from_disk_and_replaces_what_was_there(tmp_path: Path) -> None:
    assert read_quarantine(FS, str(tmp_path)) == Quarantine()
    assert read_quarantine(FS, str(tmp_path / "none")) == Quarantine()
    for quarantine in (Quarantine((BadSource("a.mp4", "no frames"),), (bad(3), bad(None, 1))), Quarantine()):
        write_quarantine(FS, str(tmp_path), quarantine)
        assert read_quarantine(FS, str(tmp_path)) == quarantine
    assert [file.name for file in tmp_path.iterdir()] == [QUARANTINE_NAME]


def test_the_list_that_was_written_before_is_read(tmp_path: Path) -> None:
    file = tmp_path / QUARANTINE_NAME
    file.write_text("[]\n")
    assert read_quarantine(FS, str(tmp_path)) == Quarantine()
    file.write_text(json.dumps([{"path": "b", "reason": "2"}, {"path": "a", "reason": "1"}], indent=1))
    assert read_quarantine(FS, str(tmp_path)) == Quarantine((BadSource("a", "1"), BadSource("b", "2")))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "the file: Invalid JSON"),
        ("{", "the file: Invalid JSON"),
        ("3", "the file: "),
        ('[{"path": "a"}]', "0.reason: Field required"),
        ('[{"path": "a", "reason": 3}]', "0.reason: "),
        ('{"sources": [], "more": 1}', "more: "),
        ('{"clips": [{"shard": "s", "row": "3", "clip": null, "reason": "r"}]}', "clips.0.row: "),
        ('{"clips": [{"shard": "s", "row": 3, "reason": "r"}]}', "clips.0.clip: Field required"),
        ('{"clips": [{"shard": "s", "row": 3, "clip": null, "reason": "r", "x": 0}]}', "clips.0.x: "),
        ('{"clips": [{"shard": "s", "row": -1, "clip": null, "reason": "r"}]}', "shard s: row -1"),
        ('{"clips": [{"shard": "s", "row": null, "clip": "c", "reason": "r"}]}', "shard s: clip c has no row"),
        ('{"schema_version": 2}', "schema version 2"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / QUARANTINE_NAME).write_text(text)
    with pytest.raises(DataError) as told:
        read_quarantine(FS, str(tmp_path))
    assert told.value.what.startswith(f"{tmp_path}/{QUARANTINE_NAME}: quarantine: {where}")
    assert told.value.fix
    assert "\n" not in str(told.value)


def test_a_storage_that_fails_is_no_quarantine(tmp_path: Path) -> None:
    (tmp_path / QUARANTINE_NAME).mkdir()
    with pytest.raises(EnvironmentFault, match="cannot read"):
        read_quarantine(FS, str(tmp_path))
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_quarantine(FS, f"{tmp_path}/none", Quarantine())
