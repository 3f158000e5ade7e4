"""Verifying a data set: what is broken is found and told apart, and what is whole stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flam_core.data.codec import STORED_CODECS, Zstd, get_codec
from flam_core.data.manifest import QUARANTINE_NAME, read_manifest, write_manifest
from flam_core.data.quarantine import BadClip, BadSource, Quarantine, write_quarantine
from flam_core.data.shard import encode_clip
from flam_core.data.verify import verify_data
from flam_core.errors import DataError
from tests.verify_fixture import CHANGED, FS, changed, clip, make_grid, rows, spoil, spoil_clip, store, train, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("verify") / "grid")


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "grid"))


def test_a_whole_data_set(whole: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    report = verify_data(FS, str(whole), on_progress=lambda done, total: seen.append((done, total)))
    assert report.quarantine == Quarantine()
    assert (report.bad_clips, report.share) == (0, 0.0)
    assert report.frames == report.manifest.frames == 16 * 24
    assert report.frames_per_second > 0
    assert seen == sorted(seen)
    assert seen[-1] == (384, 384)
    assert len(seen) == sum(len(shard.row_groups) for shard in report.manifest.shards)


def test_a_damaged_clip_is_left_out_alone_until_it_is_repaired(whole: Path, data: Path) -> None:
    shard = train(data)
    spoil_clip(data, shard, 5)
    spoil_clip(data, shard, 17)
    report = verify_data(FS, str(data), workers=1)
    ids = [row["id"] for row in rows(data, shard)]
    reason = f"the payload is damaged (crc32 differs); {CHANGED}"
    assert report.quarantine.clips == tuple(BadClip(shard.name, row, ids[row], reason) for row in (5, 17))
    assert (report.frames, report.bad_clips, report.share) == (384 - 24, 2, 2 / 32)
    write_quarantine(FS, str(data), report.quarantine)
    first = (data / QUARANTINE_NAME).read_bytes()
    write_quarantine(FS, str(data), verify(data))
    assert (data / QUARANTINE_NAME).read_bytes() == first
    shutil.copy(whole / shard.name, data / shard.name)
    assert verify(data) == Quarantine()


def test_what_was_left_out_at_ingest_stays_listed(data: Path) -> None:
    (data / QUARANTINE_NAME).write_text(json.dumps([{"path": "a.mp4", "reason": "no frames"}]))
    assert verify(data) == Quarantine(sources=(BadSource("a.mp4", "no frames"),))
    (data / QUARANTINE_NAME).write_text("{")
    with pytest.raises(DataError, match=r"quarantine\.json: .*Invalid JSON"):
        verify(data)


def test_a_missing_shard(data: Path) -> None:
    shard = train(data)
    (data / shard.name).unlink()
    assert verify(data).clips == (BadClip(shard.name, None, None, "is missing"),)


@pytest.mark.parametrize("change", [lambda content: content[:-100], lambda content: content + b"x", lambda _: b""])
def test_a_shard_of_another_size(data: Path, change: Callable[[bytes], bytes]) -> None:
    shard = train(data)
    content = change((data / shard.name).read_bytes())
    (data / shard.name).write_bytes(content)
    reason = f"has {len(content)} bytes, the manifest says {shard.bytes}"
    assert verify(data).clips == (BadClip(shard.name, None, None, reason),)


def test_a_damaged_footer(data: Path) -> None:
    shard = train(data)
    spoil(data, shard, shard.bytes - 1000, 400)
    (bad,) = verify(data).clips
    assert (bad.shard, bad.row) == (shard.name, None)
    assert bad.reason.startswith("its footer cannot be read: ")
    assert bad.reason.endswith(CHANGED)


def test_a_shard_swapped_for_another(data: Path) -> None:
    manifest = read_manifest(FS, str(data))
    val, test = manifest.split("val")[0], manifest.split("test")[0]
    shutil.copy(data / val.name, data / test.name)
    assert val.clips == test.clips  # the footer fits, and the clips are right, but they are not those of this shard
    shards = tuple(replace(one, bytes=val.bytes) if one == test else one for one in manifest.shards)
    write_manifest(FS, str(data), replace(manifest, shards=shards))
    (bad,) = verify(data).clips
    assert bad == BadClip(test.name, None, None, f"{CHANGED}, yet every clip is right: something else is wrong")


def test_a_change_that_no_clip_shows(data: Path) -> None:
    shard = train(data)
    spoil(data, shard, (data / shard.name).read_bytes().rindex(b"parquet-cpp"))  # the name of the writing program
    (bad,) = verify(data).clips
    assert bad == BadClip(shard.name, None, None, f"{CHANGED}, yet every clip is right: something else is wrong")


def test_a_row_group_that_cannot_be_read_takes_no_other_with_it(data: Path) -> None:
    shard = train(data)
    content = (data / shard.name).read_bytes()
    first_id = rows(data, shard)[8]["id"].encode()
    page = content.index(len(first_id).to_bytes(4, "little") + first_id)  # where the ids of row group 2 begin
    spoil(data, shard, page - 8, 8)  # the end of the page's header
    quarantine = verify(data)
    assert quarantine.rows(shard) == {8, 9, 10, 11}
    for bad in quarantine.clips:
        assert bad.reason.startswith("row group 2 cannot be read: ")
        assert bad.reason.endswith(CHANGED)


ROW = encode_clip(clip(1), Zstd())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (encode_clip(clip(1, size=8), Zstd()), "frames of 8x8, the manifest says 16x16"),
        (encode_clip(clip(1, rate=4.0), Zstd()), "4.0 frames a second, the manifest says 5.0"),
        (encode_clip(clip(1, truth=False), Zstd()), "has no ground truth, the manifest says it has"),
        (changed(ROW, frames=7), "zstd payload holds 4608 bytes, a clip of (7, 16, 16, 3) has 5376"),
        (changed(ROW, codec="none"), "coded as 'none', the manifest says 'zstd'"),
        (changed(ROW, crc32=3), "the payload is damaged (crc32 differs)"),
        (changed(ROW, payload=b"x", crc32=0x8CDC1683), "zstd payload does not decode: "),
        (changed(ROW, start=6), "its id is not that of episode episode 1, frame 6"),
        (changed(ROW, entities=None), "ground truth of None entities with actions of 3"),
        (changed(ROW, positions=[0.0] * 23), "positions: 23 values, 6 frames of 2 entities have 24"),
        (changed(ROW, positions=None), "positions: none values, 6 frames of 2 entities have 24"),
        (changed(ROW, actions=[*[0.0] * 35, None]), "actions: 35 values, 6 frames of 2 entities have 36"),
        (changed(ROW, rewards=[0.0] * 5), "rewards: 5 values, 6 frames of 2 entities have 6"),
        (changed(ROW, id="episode\x1b:0"), "its id is not that of episode episode 1, frame 0"),
    ],
)
def test_a_wrong_row_is_left_out_alone(tmp_path: Path, row: pa.RecordBatch, reason: str) -> None:
    store(tmp_path, [encode_clip(clip(0), Zstd()), row, encode_clip(clip(2), Zstd())])
    (bad,) = verify(tmp_path).clips
    assert bad.row == 1
    assert bad.reason.startswith(reason)
    assert bad.clip is not None
    assert bad.clip.isprintable()


def test_data_without_truth_or_of_uneven_rates(tmp_path: Path) -> None:
    plain = [encode_clip(clip(i, truth=False, rate=rate), Zstd()) for i, rate in enumerate((5.0, 4.0, float("nan")))]
    store(tmp_path, [*plain, changed(plain[0], entities=2)], has_truth=False, fps=None)
    assert [(bad.row, bad.reason) for bad in verify(tmp_path).clips] == [
        (2, "nan frames a second, the manifest says more than 0"),
        (3, "has entities but no actions"),
    ]


@pytest.mark.parametrize("codec", STORED_CODECS)
def test_each_codec(tmp_path: Path, codec: str) -> None:
    store(
        tmp_path,
        [encode_clip(clip(i), get_codec(codec)) for i in range(4)],
        encode_clip(clip(9), get_codec(codec)),
        codec=codec,
    )
    assert verify_data(FS, str(tmp_path), workers=3).quarantine == Quarantine()


def test_a_manifest_that_the_footer_does_not_fit(data: Path) -> None:
    manifest = read_manifest(FS, str(data))
    shard = train(data)
    for wrong, reason in (
        (replace(shard, row_groups=(24,)), "has 24 clips in 6 row groups that are not the manifest's"),
        (replace(shard, clip_frames=(13, *shard.clip_frames[1:-1], 11)), "12 frames, the manifest says 13"),
    ):
        shards = tuple(wrong if one == shard else one for one in manifest.shards)
        write_manifest(FS, str(data), replace(manifest, shards=shards))
        assert verify(data).clips[0].reason == reason


def test_a_file_of_other_columns(data: Path) -> None:
    shard = train(data)
    table = pa.table({"id": ["a"] * 24})
    with pa.OSFile(str(data / shard.name), "wb") as sink, pq.ParquetWriter(sink, table.schema) as writer:
        for _ in shard.row_groups:
            writer.write_table(table.slice(0, 4))
    size = (data / shard.name).stat().st_size
    manifest = read_manifest(FS, str(data))
    shards = tuple(replace(one, bytes=size) if one == shard else one for one in manifest.shards)
    write_manifest(FS, str(data), replace(manifest, shards=shards))
    assert verify(data).clips[0].reason.startswith("its columns are not those of a shard; ")
