"""LeRobot v3: episodes are cut out of the MP4s by time, with their actions; a bad one spoils itself alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import SubTreeFileSystem

from flam_core.data.shard import Clip
from flam_core.data.sources import LeRobotSource
from flam_core.data.videos import VideoOptions
from flam_core.errors import DataError, SettingsError
from tests.sources_fixture import CAMERAS, FS, LeRobotTree, make_lerobot, store

VIDEO = VideoOptions(size=32)


def source(root: Path, camera: str | None = CAMERAS[0], video: VideoOptions = VIDEO) -> LeRobotSource:
    return LeRobotSource(FS, str(root), video, "CC0-1.0", camera)


@pytest.fixture
def tree(tmp_path: Path) -> LeRobotTree:
    return make_lerobot(tmp_path / "robot")


@pytest.mark.parametrize("camera", CAMERAS)
def test_episodes_come_back(tree: LeRobotTree, tmp_path: Path, camera: str) -> None:
    report, stored = store(source(tree.root, camera), tmp_path / "set")
    assert report.bad == ()
    assert set(stored) == {f"episode-00000{i}" for i in range(7)}
    for i, frames in enumerate(tree.cameras[camera]):
        found = stored[f"episode-00000{i}"]
        kept = len(found.frames)  # an end shorter than min_clip_frames is dropped
        assert kept == len(frames) - (len(frames) % 10 if len(frames) % 10 < 4 else 0)
        np.testing.assert_allclose(found.frames.astype(int), frames[:kept], atol=3)
        np.testing.assert_array_equal(found.truth.actions, tree.actions[i][:kept, None])
        np.testing.assert_array_equal(found.truth.rewards, np.arange(kept))
        assert found.truth.positions is None
        assert found.fps == 10.0
    manifest = report.manifest
    assert (manifest.name, manifest.source, manifest.has_truth) == ("robot", "LeRobot data set robot", False)
    assert str(tmp_path) not in manifest.to_json().decode()


def test_resampling_takes_the_actions_along(tree: LeRobotTree, tmp_path: Path) -> None:
    _, stored = store(source(tree.root, video=VideoOptions(32, fps=5.0)), tmp_path / "set")
    found = stored["episode-000006"]  # 30 frames
    assert (found.fps, len(found.frames)) == (5.0, 15)
    np.testing.assert_allclose(found.frames.astype(int), tree.cameras[CAMERAS[0]][6][::2], atol=3)
    np.testing.assert_array_equal(found.truth.actions, tree.actions[6][::2, None])


def test_other_file_systems_give_the_same(tree: LeRobotTree, tmp_path: Path) -> None:
    fs = SubTreeFileSystem(str(tmp_path), FS)
    near = store(source(tree.root), tmp_path / "near")[0].manifest
    far = store(LeRobotSource(fs, "robot", VIDEO, "CC0-1.0", CAMERAS[0]), tmp_path / "far")[0].manifest
    assert near == far


def test_an_episode_left_and_taken_up_again_is_the_same(tree: LeRobotTree) -> None:
    """All episodes are begun before any goes on: even those of a file that was closed since."""
    begun = [(one.episode, next(one.clips), one.clips) for one in source(tree.root).recordings(5)]
    for i, (name, first, rest) in enumerate(begun):
        clips = [first, *rest]
        frames = np.concatenate([clip.frames for clip in clips if isinstance(clip, Clip)])
        assert name == f"episode-00000{i}"
        np.testing.assert_allclose(frames.astype(int), tree.cameras[CAMERAS[0]][i], atol=3)


def test_episodes_that_are_not_listed_are_passed_over(tree: LeRobotTree, tmp_path: Path) -> None:
    meta = tree.root / "meta/episodes/chunk-000/file-000.parquet"
    rows = [row for row in pq.read_table(meta).to_pylist() if row["episode_index"] not in (0, 4)]
    pq.write_table(pa.Table.from_pylist(rows), meta)
    report, stored = store(source(tree.root), tmp_path / "set")
    assert report.bad == ()
    np.testing.assert_allclose(stored["episode-000005"].frames.astype(int), tree.cameras[CAMERAS[0]][5][:27], atol=3)
    assert len(stored) == 5


def test_what_is_missing_or_damaged_spoils_its_episodes_alone(tmp_path: Path) -> None:
    tree = make_lerobot(tmp_path / "robot", per_file=3, count=12)
    video = tree.root / f"videos/{CAMERAS[0]}/chunk-000"
    content = (video / "file-001.mp4").read_bytes()
    (video / "file-001.mp4").write_bytes(content[: int(len(content) * 0.9)])
    (video / "file-002.mp4").unlink()
    (tree.root / "data/chunk-000/file-003.parquet").write_text("not Parquet")
    rows = pq.read_table(tree.root / "data/chunk-000/file-000.parquet")
    pq.write_table(rows.slice(0, len(rows) - 1), tree.root / "data/chunk-000/file-000.parquet")
    report, stored = store(source(tree.root), tmp_path / "set")
    reasons = {int(bad.path[-2:]): bad.reason for bad in report.bad}
    assert set(stored) == {f"episode-00000{i}" for i in (0, 1, 3, 4)}
    assert set(reasons) == {2, 5, 6, 7, 8, 9, 10, 11}
    assert reasons[2] == "data/chunk-000/file-000.parquet has 17 rows of its 18 frames, or others"
    assert f"videos/{CAMERAS[0]}/chunk-000/file-001.mp4: truncated or damaged" in reasons[5]
    assert reasons[7] == f"videos/{CAMERAS[0]}/chunk-000/file-002.mp4: missing"
    assert "data/chunk-000/file-003.parquet: truncated or damaged" in reasons[10]
    assert str(tmp_path) not in "".join(reasons.values())


def test_a_wrong_length_is_found(tree: LeRobotTree, tmp_path: Path) -> None:
    """The last episode of a file is said to be longer than the film; another to begin between two frames' times."""
    meta = tree.root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(meta).to_pylist()
    info = json.loads((tree.root / "meta/info.json").read_text())
    del info["features"]["action"], info["features"]["next.reward"]
    (tree.root / "meta/info.json").write_text(json.dumps(info))
    rows[2]["length"] += 5
    pq.write_table(pa.Table.from_pylist(rows), meta)
    report, stored = store(source(tree.root), tmp_path / "set")
    assert [(bad.path, bad.reason) for bad in report.bad] == [
        ("episode-000002", f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4 ends after 18 of its 23 frames")
    ]
    assert stored["episode-000003"].truth is None


def test_what_cannot_work_is_refused(tree: LeRobotTree, tmp_path: Path) -> None:
    def change(**fields: object) -> None:
        path = tree.root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    with pytest.raises(SettingsError, match=f"2 cameras. Give --camera, one of: {CAMERAS[0]}, {CAMERAS[1]}"):
        store(source(tree.root, None), tmp_path / "set")
    with pytest.raises(
        SettingsError, match=r"no camera 'observation.images.tip'. Did you mean 'observation.images.top'"
    ):
        store(source(tree.root, "observation.images.tip"), tmp_path / "set")
    with pytest.raises(DataError, match=r"has no meta/info\.json"):
        store(source(tmp_path / "none"), tmp_path / "set")
    change(video_path="../{video_key}.mp4")
    with pytest.raises(DataError, match="leads out of the data set"):
        store(source(tree.root), tmp_path / "set")
    change(video_path="{nothing}.mp4")
    with pytest.raises(DataError, match="cannot be filled in"):
        store(source(tree.root), tmp_path / "set")
    change(codebase_version="v2.1")
    with pytest.raises(DataError, match=r"format v2.1, flam reads v3. Convert it with LeRobot's own script"):
        store(source(tree.root), tmp_path / "set")
    change(codebase_version="v3.0", features={"observation.image": {"dtype": "image"}, "action": {"dtype": "float32"}})
    with pytest.raises(DataError, match=r"as pictures in Parquet.*--parquet .*--image_column observation.image"):
        store(source(tree.root, None), tmp_path / "set")
    change(features={"action": {"dtype": "float32"}})
    with pytest.raises(DataError, match="no feature is a video"):
        store(source(tree.root, None), tmp_path / "set")
    (tree.root / "meta/info.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        store(source(tree.root), tmp_path / "set")
    assert not (tmp_path / "set").exists()
