"""Parquet files of videos and of pictures: rows become episodes, columns are found or named, bad rows are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flam_core.data.sources import ParquetColumns, ParquetSource
from flam_core.data.videos import VideoOptions
from flam_core.errors import DataError, SettingsError
from tests.sources_fixture import FS, episodes, image_bytes, picture_rows, store, video_bytes, write_parquet

VIDEO = VideoOptions(size=32)
EPISODES = episodes(4)


def source(path: Path | str, image_fps: float | None = None, **columns: str) -> ParquetSource:
    return ParquetSource(FS, str(path), VIDEO, "CC0-1.0", ParquetColumns(**columns), image_fps)


def test_rows_of_videos_come_back(tmp_path: Path) -> None:
    rows = [
        {"video": video_bytes(one.frames), "caption": "two agents", "actions": one.actions.tolist(), "size": 32}
        for one in EPISODES
    ]
    write_parquet(tmp_path / "in" / "part-0.parquet", rows[:3], group=2)
    write_parquet(tmp_path / "in" / "deep" / "part-1.parquet", rows[3:])
    report, stored = store(source(tmp_path / "in"), tmp_path / "set")
    assert report.bad == ()
    assert set(stored) == {"deep/part-1/000000", *(f"part-0/00000{i}" for i in range(3))}
    for i in range(3):
        found = stored[f"part-0/00000{i}"]
        np.testing.assert_allclose(found.frames.astype(int), EPISODES[i].frames, atol=3)
        np.testing.assert_array_equal(found.truth.actions, EPISODES[i].actions)
    assert (report.manifest.source, report.manifest.fps) == ("Parquet in", 10.0)
    assert str(tmp_path) not in report.manifest.to_json().decode()


def test_videos_of_one_episode_stay_together(tmp_path: Path) -> None:
    """Three rows an episode: neighbours in time must not be divided between train and test."""
    rows = [
        {"mp4": {"bytes": video_bytes(one.frames[8 * k : 8 * k + 8]), "path": None}, "video_id": f"v{i}"}
        for i, one in enumerate(EPISODES)
        for k in range(3)
    ]
    _, stored = store(source(write_parquet(tmp_path / "a.parquet", rows, group=2)), tmp_path / "set")
    assert set(stored) == {"v0", "v1", "v2", "v3"}
    for i, one in enumerate(EPISODES):
        np.testing.assert_allclose(stored[f"v{i}"].frames.astype(int), one.frames, atol=3)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("name", ["image", "observation.images.top"])
def test_rows_of_pictures_come_back_in_their_order(tmp_path: Path, struct: bool, name: str) -> None:
    """An episode goes on in the next file; its rows are in any order; its column may have dots in its name."""
    rows = picture_rows(EPISODES, name, struct=struct, shuffle=True)
    write_parquet(tmp_path / "in" / "0.parquet", rows[:40])
    write_parquet(tmp_path / "in" / "1.parquet", rows[40:])
    report, stored = store(source(tmp_path / "in", 10.0), tmp_path / "set")
    assert report.bad == ()
    assert set(stored) == {"0", "1", "2", "3"}
    for i, one in enumerate(EPISODES):
        found = stored[str(i)]
        np.testing.assert_array_equal(found.frames, one.frames)
        np.testing.assert_array_equal(found.truth.actions, one.actions)
        np.testing.assert_allclose(found.truth.positions, one.positions, atol=1e-6)
        np.testing.assert_array_equal(found.truth.rewards, np.arange(24))
    assert report.manifest.has_truth


def test_columns_may_be_named(tmp_path: Path) -> None:
    renamed = {"image": "left", "episode_index": "run", "frame_index": "n"}
    rows = [
        {renamed.get(key, key): value for key, value in row.items()} for row in picture_rows(EPISODES, shuffle=True)
    ]
    rows = [row | {"right": row["left"], "frame_index": 7} for row in rows]
    path = write_parquet(tmp_path / "a.parquet", rows)
    columns = {"image": "left", "episode": "run", "index": "n"}
    report, stored = store(source(path, 10.0, **columns), tmp_path / "set")
    np.testing.assert_array_equal(stored["0"].frames, EPISODES[0].frames)
    assert report.manifest.settings["parquet.image_column"] == "left"
    with pytest.raises(
        SettingsError, match=r"no column 'lef'. Did you mean 'left'\? The columns are left, run, n, action"
    ):
        store(source(path, 10.0, **(columns | {"image": "lef"})), tmp_path / "no")
    with pytest.raises(SettingsError, match=r"cannot tell which column.*binary columns: left, right"):
        store(source(path, 10.0), tmp_path / "no")
    with pytest.raises(SettingsError, match=r"column 'action' is .*not binary"):
        store(source(path, 10.0, image="action"), tmp_path / "no")
    with pytest.raises(SettingsError, match=r"'action' is not of whole numbers"):
        store(source(path, 10.0, **(columns | {"index": "action"})), tmp_path / "no")
    with pytest.raises(
        SettingsError, match=r"no column says which episode.*--episode_column, one of: run, n, frame_index"
    ):
        store(source(path, 10.0, image="left"), tmp_path / "no")
    with pytest.raises(SettingsError, match=r"how many a second.*--image_fps"):
        store(source(path, None, **columns), tmp_path / "no")
    with pytest.raises(SettingsError, match="either videos or pictures"):
        store(source(path, 10.0, video="left", image="right"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_bad_rows_are_named_with_their_reason(tmp_path: Path) -> None:
    good = video_bytes(EPISODES[0].frames)
    rows: list[dict[str, Any]] = [{"video": good, "actions": EPISODES[0].actions.tolist()} for _ in range(7)]
    rows[1]["video"] = good[: len(good) // 2]
    rows[3]["video"] = None
    rows[4]["actions"] = EPISODES[0].actions[:-1].tolist()
    report, stored = store(source(write_parquet(tmp_path / "v.parquet", rows)), tmp_path / "videos")
    assert set(stored) == {f"v/00000{i}" for i in (0, 2, 5, 6)}
    assert {bad.path: bad.reason for bad in report.bad} == {
        "v/000001": "truncated or damaged: its index (moov) cannot be read, 0 frames decoded",
        "v/000003": "empty file (0 bytes)",
        "v/000004": "more frames than the 23 of its ground truth",
    }


def test_bad_pictures_spoil_their_episode_alone(tmp_path: Path) -> None:
    rows = [
        {"image": image_bytes(frame), "episode": f"e{i}", "step": t}
        for i in range(9)
        for t, frame in enumerate(EPISODES[i % 4].frames[:8])
    ]
    rows[8 * 1 + 3]["image"] = rows[11]["image"][:60]
    rows[8 * 2 + 3]["step"] = 2
    rows[8 * 3 + 5]["step"] = None
    rows[8 * 4 + 5]["image"] = None
    del rows[8 * 5 + 5]
    rows.append({**rows[0], "step": 8})
    report, stored = store(source(write_parquet(tmp_path / "a.parquet", rows), 10.0), tmp_path / "set")
    assert set(stored) == {"e0", "e6", "e7", "e8"}
    reasons = {bad.path: bad.reason for bad in report.bad}
    assert "image a/000011: " in reasons["e1"]
    assert reasons["e2"] == "picture 2 comes twice"
    assert reasons["e3"] == "rows without a number"
    assert "image a/000037: not a picture" in reasons["e4"]
    assert reasons["e5"] == "picture goes from 4 to 6, elsewhere in steps of 1"
    assert "an episode of this name came before: rows of one episode must be neighbours" in reasons["e0"]


def test_damaged_files_are_named_and_the_rest_goes_through(tmp_path: Path) -> None:
    rows = picture_rows(EPISODES)
    for i in range(4):
        write_parquet(tmp_path / "in" / f"{i}.parquet", rows[24 * i : 24 * i + 24])
    write_parquet(tmp_path / "in" / "4.parquet", [{"something": 1}])
    (tmp_path / "in" / "5.parquet").write_text("not Parquet")
    whole = write_parquet(tmp_path / "in" / "6.parquet", [row | {"episode_index": 6} for row in rows[:24]], group=100)
    content = bytearray(whole.read_bytes())
    content[200:2000] = bytes(1800)
    whole.write_bytes(content)
    report, stored = store(source(tmp_path / "in", 10.0), tmp_path / "set")
    reasons = {bad.path: bad.reason for bad in report.bad}
    assert reasons["3"] == "4.parquet, where it may go on, is bad"
    assert set(stored) == {"0", "1", "2"}
    assert reasons["4.parquet"].startswith("no column image, episode_index, frame_index")
    assert reasons["5.parquet"].startswith("truncated or damaged: ")
    assert set(reasons) <= {"3", "4.parquet", "5.parquet", "6.parquet", "6"}
    assert {"6.parquet", "6"} & set(reasons)


def test_pictures_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    depth = image_bytes(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60)
    grey = image_bytes(EPISODES[0].frames[0, :, :, 0])
    rows = [{"image": grey, "episode": i, "step": t} for i in range(3) for t in range(8)]
    rows += [{"image": depth, "episode": 3, "step": t} for t in range(8)]
    report, stored = store(source(write_parquet(tmp_path / "a.parquet", rows), 10.0), tmp_path / "set")
    np.testing.assert_array_equal(stored["0"].frames[0], np.repeat(EPISODES[0].frames[0, :, :, :1], 3, axis=-1))
    assert [bad.path for bad in report.bad] == ["3"]
    assert "not 8 bits a channel" in report.bad[0].reason


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no Parquet files in"):
        store(source(tmp_path / "in"), tmp_path / "set")
    write_parquet(tmp_path / "in" / "a.parquet", [{"text": "none", "number": 1}])
    with pytest.raises(SettingsError, match=r"binary columns: none; all columns: text, number"):
        store(source(tmp_path / "in"), tmp_path / "set")
    assert not (tmp_path / "set").exists()
