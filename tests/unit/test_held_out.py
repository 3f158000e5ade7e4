"""Evaluation leaves out what is quarantined and what turns out to be broken, and names the latter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flam_core.data.manifest import Manifest, read_manifest
from flam_core.data.quarantine import BadClip, Quarantine
from flam_core.data.shard import Truth, read_row_group
from flam_core.data.sources import IteratorSource
from flam_core.data.videos import VideoOptions
from flam_core.evaluation.held_out import held_out_clips
from tests.sources_fixture import FS, episodes, store


@pytest.fixture
def stored(tmp_path: Path) -> tuple[str, Manifest]:
    given = [(episode.frames, Truth()) for episode in episodes(20)]
    source = IteratorSource("mine", given, fps=7.0, video=VideoOptions(size=32))
    store(source, tmp_path / "set")
    return str(tmp_path / "set"), read_manifest(FS, str(tmp_path / "set"))


def read(stored: tuple[str, Manifest], quarantine: Quarantine) -> tuple[list[str], list[BadClip]]:
    """Ids of the train clips, and what was broken."""
    path, manifest = stored
    broken: list[BadClip] = []
    clips = held_out_clips(manifest, FS, path, "train", 4, 9999, quarantine=quarantine, on_broken=broken.append)
    assert all(clip.frames.shape == (4, 32, 32, 3) and clip.frames.dtype == np.uint8 for clip in clips)
    return [clip.id for clip in clips], broken


def clip_ids(stored: tuple[str, Manifest]) -> list[str]:
    path, manifest = stored
    shard = manifest.split("train")[0]
    groups = range(len(shard.row_groups))
    return [id_ for group in groups for id_ in read_row_group(FS, f"{path}/{shard.name}", group)["id"].to_pylist()]


def of_clip(windows: list[str], clip: str) -> list[str]:
    return [id_ for id_ in windows if id_.rpartition("@")[0] == clip]


def test_quarantined_clips_are_left_out(stored: tuple[str, Manifest]) -> None:
    shard, ids = stored[1].split("train")[0].name, clip_ids(stored)
    before, _ = read(stored, Quarantine())
    assert of_clip(before, ids[1])
    after, broken = read(stored, Quarantine(clips=(BadClip(shard, 1, ids[1], "looks wrong"),)))
    assert after == [id_ for id_ in before if id_ not in of_clip(before, ids[1])]
    assert not broken
    assert read(stored, Quarantine(clips=(BadClip(shard, None, None, "all of it"),)))[0] == [
        id_ for id_ in before if not any(of_clip([id_], clip) for clip in ids)
    ]


def test_a_broken_clip_is_named_and_the_rest_read(stored: tuple[str, Manifest]) -> None:
    path, manifest = stored
    shard, ids = manifest.split("train")[0].name, clip_ids(stored)
    before, _ = read(stored, Quarantine())
    file = Path(path) / shard
    payload = read_row_group(FS, str(file), 0).to_pylist()[2]["payload"]
    content = bytearray(file.read_bytes())
    content[content.index(payload) + len(payload) // 2] ^= 1
    file.write_bytes(bytes(content))
    after, broken = read(stored, Quarantine())
    assert [(bad.shard, bad.row, bad.clip) for bad in broken] == [(shard, 2, ids[2])]
    assert "crc32" in broken[0].reason
    assert after == [id_ for id_ in before if id_ not in of_clip(before, ids[2])]


def test_all_clips_of_a_truncated_shard_are_named(stored: tuple[str, Manifest]) -> None:
    path, manifest = stored
    shard = manifest.split("train")[0]
    file = Path(path) / shard.name
    file.write_bytes(file.read_bytes()[:-100])
    after, broken = read(stored, Quarantine())
    assert [bad.row for bad in broken] == list(range(shard.clips))
    assert not after  # all train clips are in this one shard
