"""Shards: rows come back as written, sizes are kept, and damage is told by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.codec import Zstd, get_codec
from flam_core.data.shard import (
    FRAME_COLUMNS,
    TRUTH_COLUMNS,
    Clip,
    ShardWriter,
    Truth,
    WrittenShard,
    decode_clip,
    decode_truth,
    encode_clip,
    read_row_group,
    verify_shard,
)
from flam_core.errors import DataError, EnvironmentFault

FS = LocalFileSystem()


def clip(index: int, frames: int = 5, noise: bool = False, truth: bool = True, rewards: bool = True) -> Clip:
    """A clip of 12 x 16 pixels; noise does not compress."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256 if noise else 2, size=(frames, 12, 16, 3), dtype=np.uint8)
    actions = rng.normal(size=(frames, 3, 2)).astype(np.float32)
    positions = rng.random((frames, 3, 2)).astype(np.float32)
    positions[0, 0] = np.nan
    reward = rng.normal(size=frames).astype(np.float32) if rewards else None
    return Clip(f"episode {index}", 7, pixels, 8.0, Truth(actions, positions, reward) if truth else None)


def write(folder: Path, clips: list[Clip], **sizes: int) -> list[WrittenShard]:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(FS, str(folder), "train", **sizes)
    for one in clips:
        writer.write(encode_clip(one, Zstd()))
    return writer.close()


def rows(path: str, groups: int = 1, columns: tuple[str, ...] = FRAME_COLUMNS) -> list[dict[str, Any]]:
    return [row for group in range(groups) for row in read_row_group(FS, path, group, columns).to_pylist()]


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (5, 12, 16, 3), (128, 64, 64, 3)])
def test_zstd_is_lossless(shape: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    payload = Zstd().encode(frames)
    np.testing.assert_array_equal(Zstd().decode(payload, *shape[:3]), frames)
    np.testing.assert_array_equal(Zstd().decode(memoryview(payload), *shape[:3]), frames)


def test_zstd_encodes_a_view_that_is_not_contiguous() -> None:
    frames = np.random.default_rng(0).integers(0, 256, size=(6, 12, 16, 3), dtype=np.uint8)[::2, :, ::-1]
    np.testing.assert_array_equal(Zstd().decode(Zstd().encode(frames), 3, 12, 16), frames)


def test_zstd_refuses_what_is_no_such_clip() -> None:
    payload = Zstd().encode(np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"holds 96 bytes, a clip of \(3, 4, 4, 3\) has 144"):
        Zstd().decode(payload, 3, 4, 4)
    for damaged in (b"", b"no zstd frame", payload[:-4]):
        with pytest.raises(DataError, match="zstd payload"):
            Zstd().decode(damaged, 2, 4, 4)


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(DataError, match="unknown codec 'h266'"):
        get_codec("h266")


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    clips = [clip(0), clip(1, frames=1), clip(2, truth=False), clip(3, rewards=False)]
    (written,) = write(tmp_path, clips)
    for one, row in zip(clips, rows(written.path), strict=True):
        frames = decode_clip(row, written.shard.name)
        np.testing.assert_array_equal(frames, one.frames)
        assert frames.dtype == np.uint8
        assert (row["id"], row["episode"], row["start"], row["fps"]) == (one.id, one.episode, 7, 8.0)
    for one, row in zip(clips, rows(written.path, columns=TRUTH_COLUMNS), strict=True):
        truth = decode_truth(row)
        if one.truth is None or truth is None:
            assert truth is one.truth
            continue
        np.testing.assert_array_equal(truth.actions, one.truth.actions)
        np.testing.assert_array_equal(truth.positions, one.truth.positions)
        assert (truth.rewards is None) == (one.truth.rewards is None)
        if one.truth.rewards is not None and truth.rewards is not None:
            np.testing.assert_array_equal(truth.rewards, one.truth.rewards)
            assert truth.rewards.dtype == np.float32


def test_the_entry_tells_what_the_file_holds(tmp_path: Path) -> None:
    (written,) = write(tmp_path, [clip(i, frames=i + 1) for i in range(7)], row_group_clips=3)
    shard, content = written.shard, Path(written.path).read_bytes()
    assert (shard.clips, shard.frames, shard.clip_frames) == (7, 28, (1, 2, 3, 4, 5, 6, 7))
    assert shard.row_groups == (3, 3, 1)
    assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert shard.name == f"shards/train-00000-{shard.sha256[:12]}.parquet"
    layout = pq.ParquetFile(written.path).metadata
    assert tuple(layout.row_group(i).num_rows for i in range(layout.num_row_groups)) == shard.row_groups
    assert [row["id"] for row in rows(written.path, 3)] == [f"episode {i}:7" for i in range(7)]


def test_the_payload_is_stored_as_it_is_and_truth_is_compressed(tmp_path: Path) -> None:
    (written,) = write(tmp_path, [clip(i, noise=True) for i in range(20)])
    group = pq.ParquetFile(written.path).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    payload = columns["payload"]
    assert payload.compression == "UNCOMPRESSED"
    assert not any("DICTIONARY" in encoding for encoding in payload.encodings)
    assert not payload.is_stats_set
    assert columns["actions.list.element"].compression == "ZSTD"


def test_row_groups_and_shards_keep_to_their_sizes(tmp_path: Path) -> None:
    clips = [clip(i, noise=True, truth=False) for i in range(40)]  # about 3 kB each
    shards = [entry.shard for entry in write(tmp_path, clips, row_group_bytes=10_000, shard_bytes=25_000)]
    assert len(shards) > 2
    assert all(group == 3 for shard in shards[:-1] for group in shard.row_groups)
    assert all(len(shard.row_groups) == 2 for shard in shards[:-1])
    assert sum(shard.clips for shard in shards) == 40
    assert [shard.name[:18] for shard in shards] == [f"shards/train-{i:05d}" for i in range(len(shards))]


def test_a_clip_larger_than_a_row_group_and_a_shard_is_stored(tmp_path: Path) -> None:
    shards = write(tmp_path, [clip(i, noise=True) for i in range(3)], row_group_bytes=100, shard_bytes=100)
    assert [entry.shard.row_groups for entry in shards] == [(1,), (1,), (1,)]


def test_equal_clips_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, [clip(i) for i in range(9)], row_group_clips=4) for name in ("a", "b"))
    assert [entry.shard for entry in first] == [entry.shard for entry in second]


def test_abort_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(FS, str(tmp_path), "train", row_group_clips=2, shard_bytes=100)
    for index in range(7):
        writer.write(encode_clip(clip(index), Zstd()))
    assert any(tmp_path.iterdir())
    writer.abort()
    assert not any(tmp_path.iterdir())


def test_damage_in_a_payload_names_shard_and_clip(tmp_path: Path) -> None:
    (written,) = write(tmp_path, [clip(i, noise=True) for i in range(3)])
    content = bytearray(Path(written.path).read_bytes())
    at = content.index(rows(written.path)[1]["payload"]) + 1000
    content[at] ^= 1
    Path(written.path).write_bytes(content)
    damaged = rows(written.path)
    decode_clip(damaged[0], "shards/x.parquet")
    with pytest.raises(DataError, match=r"shard shards/x.parquet, clip episode 1:7: the payload is damaged"):
        decode_clip(damaged[1], "shards/x.parquet")
    decode_clip(damaged[2], "shards/x.parquet")


def test_a_row_that_cannot_be_decoded_names_shard_and_clip(tmp_path: Path) -> None:
    (written,) = write(tmp_path, [clip(0)])
    (row,) = rows(written.path)
    for change, message in (({"codec": "none"}, "unknown codec 'none'"), ({"frames": 6}, "holds 2880 bytes")):
        with pytest.raises(DataError, match=f"shard s, clip episode 0:7: .*{message}"):
            decode_clip(row | change, "s")


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet is missing"):
        read_row_group(FS, f"{tmp_path}/none.parquet", 0)
    (written,) = write(tmp_path, [clip(0)])
    path = Path(written.path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged"):
        read_row_group(FS, written.path, 0)
    with pytest.raises(EnvironmentFault, match="cannot read shard"):
        read_row_group(FS, str(tmp_path), 0)


def test_verify_shard(tmp_path: Path) -> None:
    (written,) = write(tmp_path, [clip(i) for i in range(4)])
    shard, path = written.shard, tmp_path / written.shard.name
    with pytest.raises(DataError, match="is missing"):
        verify_shard(FS, str(tmp_path), shard)
    path.parent.mkdir()
    Path(written.path).rename(path)
    verify_shard(FS, str(tmp_path), shard)
    with pytest.raises(DataError, match=f"has {shard.bytes} bytes, the manifest says {shard.bytes + 1}"):
        verify_shard(FS, str(tmp_path), replace(shard, bytes=shard.bytes + 1))
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.name} has changed"):
        verify_shard(FS, str(tmp_path), shard)


@pytest.mark.parametrize("names", [("actions",), ("positions",), ("rewards",), ("positions", "rewards")])
def test_part_of_the_truth_comes_back(names: tuple[str, ...]) -> None:
    whole = clip(0).truth
    part = Truth(**{name: getattr(whole, name) for name in names})
    (row,) = encode_clip(replace(clip(0), truth=part), Zstd()).to_pylist()
    found = decode_truth(row)
    for name in ("actions", "positions", "rewards"):
        np.testing.assert_array_equal(getattr(found, name), getattr(part, name), err_msg=name)


def test_a_clip_of_wrong_shape_is_refused() -> None:
    good = clip(0)
    assert good.truth is not None
    for frames in (good.frames[..., :2], good.frames.astype(np.float32), good.frames[:0], good.frames[0]):
        with pytest.raises(DataError, match="not uint8"):
            replace(good, frames=frames)
    for truth in (
        replace(good.truth, actions=good.truth.actions[:-1]),
        replace(good.truth, positions=good.truth.positions[:, :2]),
        replace(good.truth, rewards=good.truth.actions[:, 0]),
        Truth(positions=good.truth.positions[:-1]),
        Truth(rewards=np.zeros(4, np.float32)),
        Truth(actions=np.zeros(5, np.float32)),
    ):
        with pytest.raises(DataError, match="5 frames, but actions"):
            replace(good, truth=truth)
