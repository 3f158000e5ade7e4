"""Ingest: what goes in comes out, in splits by episode, and a failure leaves nothing behind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from flam_core.data import ingest as ingest_module
from flam_core.data import publish as publish_module
from flam_core.data.ingest import IngestOptions, ingest, ingest_folder, ingest_world, split_labels
from flam_core.data.manifest import QUARANTINE_NAME, SPLITS, read_manifest
from flam_core.data.quarantine import BadSource, Quarantine, read_quarantine
from flam_core.data.shard import FRAME_COLUMNS, TRUTH_COLUMNS, decode_truth, read_row_group
from flam_core.data.sources import WorldSource
from flam_core.data.videos import VideoOptions
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from flam_core.worlds.base import Episode
from flam_core.worlds.grid import GridWorld
from tests.stored_fixture import stored
from tests.videos_fixture import OK, make_video_folder

FS = LocalFileSystem()
WORLD = GridWorld(agents=2, frame_size=32)


@dataclass(frozen=True)
class UnevenWorld:
    """Episodes of the lengths given; `fail_at` raises in that episode."""

    lengths: tuple[int, ...]
    fail_at: int = -1
    rewards: bool = False
    name: str = "uneven"
    licence: str = "MIT"
    fps: float = 5.0
    frame_size: int = 32

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        for index, length in enumerate(self.lengths[:count]):
            if index == self.fail_at:
                raise OSError("the disk is on fire")
            (episode,) = WORLD.episodes(1, length, seed + index)
            yield replace(episode, rewards=np.arange(length, dtype=np.float32)) if self.rewards else episode


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_world_comes_back_with_frames_and_truth(tmp_path: Path) -> None:
    options = IngestOptions(clip_frames=20, min_clip_frames=8, row_group_clips=4)
    path = f"{tmp_path}/a/set"
    report = ingest_world(WORLD, FS, path, episodes=12, frames=50, seed=3, options=options)
    episodes = {f"grid-{i:08d}": episode for i, episode in enumerate(WORLD.episodes(12, 50, 3))}
    found = stored(FS, path)
    assert set(found) == {f"{name}:{start}" for name in episodes for start in (0, 20, 40)}
    for clip_id, (_, frames) in found.items():
        name, start = clip_id.split(":")
        np.testing.assert_array_equal(frames, episodes[name].frames[int(start) : int(start) + 20])
    shard = report.manifest.split("train")[0]
    for row in read_row_group(FS, f"{path}/{shard.name}", 0, [*FRAME_COLUMNS[1:3], *TRUTH_COLUMNS]).to_pylist():
        truth, part = decode_truth(row), slice(row["start"], row["start"] + row["frames"])
        assert truth is not None
        assert truth.rewards is None
        np.testing.assert_array_equal(truth.actions, episodes[row["episode"]].actions[part])
        np.testing.assert_array_equal(truth.positions, episodes[row["episode"]].positions[part])
    manifest = report.manifest
    assert (manifest.name, manifest.licence, manifest.fps, manifest.frame_size) == ("grid", "Apache-2.0", 8.0, (32, 32))
    assert manifest.has_truth
    assert "agents=2" in manifest.source
    assert (report.clips, report.frames, report.dropped_frames, report.bad) == (36, 600, 0, ())
    assert report.bytes == sum((Path(path) / shard.name).stat().st_size for shard in manifest.shards)
    assert report.seconds > 0
    assert report.frames_per_second > 0
    assert set(files(Path(path))) == {"manifest.json", QUARANTINE_NAME, *(shard.name for shard in manifest.shards)}
    assert read_quarantine(FS, path) == Quarantine()


def test_splits_are_disjoint_by_episode_and_of_the_right_size(tmp_path: Path) -> None:
    report = ingest_world(
        WORLD, FS, str(tmp_path), episodes=30, frames=40, seed=0, options=IngestOptions(clip_frames=20)
    )
    split_of: dict[str, set[str]] = {}
    for clip_id, (split, _) in stored(FS, str(tmp_path)).items():
        split_of.setdefault(clip_id.split(":")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert Counter(next(iter(splits)) for splits in split_of.values()) == {"train": 24, "val": 3, "test": 3}
    assert report.manifest.episodes == {"train": 24, "val": 3, "test": 3}


@pytest.mark.parametrize("episodes", [3, 4, 9, 10, 25, 100])
@pytest.mark.parametrize("known", [True, False])
def test_split_labels(episodes: int, known: bool) -> None:
    labels = split_labels(episodes if known else None, 5)
    found = [next(labels) for _ in range(episodes)]
    counts = Counter(found)
    assert set(found[:3]) == set(SPLITS)
    slack = 0 if known else 1
    assert abs(counts["val"] - max(1, round(episodes / 10))) <= slack
    assert abs(counts["test"] - max(1, round(episodes / 10))) <= slack
    again = split_labels(episodes if known else None, 5)
    assert found == [next(again) for _ in range(episodes)]
    others = [split_labels(episodes if known else None, seed) for seed in range(20)]
    assert len({tuple(next(other) for _ in range(episodes)) for other in others}) > 3


def test_equal_input_gives_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ingest_world(WORLD, FS, str(tmp_path / name), episodes=5, frames=40, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert read_manifest(FS, str(tmp_path / "a")).sha256 != read_manifest(FS, str(tmp_path / "c")).sha256


def test_ends_of_episodes_are_kept_dropped_and_counted(tmp_path: Path) -> None:
    world = UnevenWorld((64, 80, 75, 10, 16, 1), rewards=True)
    options = IngestOptions(clip_frames=64, min_clip_frames=16)
    report = ingest_world(world, FS, str(tmp_path), episodes=6, frames=99, options=options)
    lengths = {clip_id: len(frames) for clip_id, (_, frames) in stored(FS, str(tmp_path)).items()}
    names = [f"uneven-{i:08d}" for i in range(6)]
    assert lengths == {
        f"{names[0]}:0": 64,
        f"{names[1]}:0": 64,
        f"{names[1]}:64": 16,
        f"{names[2]}:0": 64,
        f"{names[4]}:0": 16,
    }
    assert report.dropped_frames == 11 + 10 + 1
    assert [(bad.path, bad.reason) for bad in report.bad] == [
        (names[3], "10 frames: too short for a clip of 16"),
        (names[5], "1 frame: too short for a clip of 16"),
    ]
    assert BadSource(names[5], "1 frame: too short for a clip of 16") in read_quarantine(FS, str(tmp_path)).sources


@pytest.mark.parametrize(("size", "length"), [(96, 128), (104, 64)])
def test_clip_length_by_default(tmp_path: Path, size: int, length: int) -> None:
    report = ingest_world(GridWorld(frame_size=size), FS, str(tmp_path), episodes=3, frames=130)
    assert max(frames for shard in report.manifest.shards for frames in shard.clip_frames) == length


def test_progress_is_told_after_each_clip(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    options = IngestOptions(clip_frames=20)
    ingest_world(
        WORLD, FS, str(tmp_path), episodes=3, frames=40, options=options, on_progress=lambda *at: told.append(at)
    )
    assert told == [(done, 120) for done in range(20, 121, 20)]


def test_a_folder_of_every_kind_of_video(tmp_path: Path) -> None:
    expected = make_video_folder(tmp_path / "videos")
    told: list[tuple[int, int | None]] = []
    report = ingest_folder(
        tmp_path / "videos",
        FS,
        f"{tmp_path}/set/",
        video=VideoOptions(size=64, fps=10.0),
        licence="CC0-1.0",
        name="mixed",
        on_progress=lambda *at: told.append(at),
    )
    good = {name for name, reason in expected.items() if reason == OK}
    bad = {entry.path: entry.reason for entry in report.bad}
    assert set(bad) == set(expected) - good
    assert all(expected[name] in reason for name, reason in bad.items())
    assert {(entry.path, entry.reason) for entry in read_quarantine(FS, f"{tmp_path}/set").sources} == set(bad.items())
    found = stored(FS, f"{tmp_path}/set")
    assert {clip_id.split(":")[0] for clip_id in found} == good
    assert all(frames.shape[1:] == (64, 64, 3) for _, frames in found.values())
    manifest = report.manifest
    assert (manifest.name, manifest.licence, manifest.fps, manifest.has_truth) == ("mixed", "CC0-1.0", 10.0, False)
    assert sum(manifest.episodes.values()) == len(good)
    assert min(manifest.episodes.values()) > 0
    assert str(tmp_path) not in manifest.to_json().decode()
    assert told[-1][0] >= report.frames
    assert told[-1][1] is None
    again = ingest_folder(
        tmp_path / "videos",
        FS,
        f"{tmp_path}/again",
        video=VideoOptions(size=64, fps=10.0),
        licence="CC0-1.0",
        name="mixed",
    )
    assert again.manifest.to_json() == manifest.to_json()


def test_a_long_episode_waits_on_disk_and_names_need_not_be_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video_folder(tmp_path / "videos", bad=False)
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / "videos" / "h264_444.mp4").rename(tmp_path / "videos" / name)
    in_memory = ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/a").manifest
    monkeypatch.setattr(ingest_module, "_SPOOL_BYTES", 100)
    assert ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/b").manifest == in_memory
    assert "caf\\xe9.mp4:0" in stored(FS, f"{tmp_path}/b")


def test_mixed_rates_are_told_by_clip(tmp_path: Path) -> None:
    make_video_folder(tmp_path / "videos", bad=False)
    report = ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/set")
    assert report.bad == ()
    assert report.manifest.fps is None


@pytest.mark.parametrize("content", [None, "text"])
def test_a_folder_without_a_usable_video(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "videos").mkdir()
    if content is not None:
        for name in ("a.mp4", "b.mkv"):
            (tmp_path / "videos" / name).write_text(content)
    with pytest.raises(DataError) as caught:
        ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/set")
    message = str(caught.value)
    assert (
        ("no video files" in message) if content is None else ("a.mp4: not a video" in message and "b.mkv" in message)
    )
    assert "\n" not in message
    assert not (tmp_path / "set").exists()


def test_two_episodes_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 usable episodes, but a data set needs 3"):
        ingest_world(WORLD, FS, f"{tmp_path}/set", episodes=2, frames=40)
    with pytest.raises(DataError, match=r"2 usable episodes.*uneven-00000002: 3 frames: too short"):
        ingest_world(UnevenWorld((40, 40, 3)), FS, f"{tmp_path}/set", episodes=3, frames=40)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("fail_at", [3, 12])  # while the sample is read; when shards are being written
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, fail_at: int) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    world = UnevenWorld((40,) * 16, fail_at=fail_at)
    options = IngestOptions(row_group_clips=1)
    with pytest.raises(EnvironmentFault, match=r"cannot write the data set at .*: the disk is on fire"):
        ingest_world(world, FS, f"{tmp_path}/set", episodes=16, frames=40, options=options)
    assert files(tmp_path / "set") == {"mine.txt": b"mine"}
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (publish_module, "write_manifest"),
        (ingest_module, "_manifest"),
        (ingest_module, "_write_clips"),
        (ingest_module, "choose_codec"),
    ],
)
def test_a_crash_at_any_step_keeps_the_data_set_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    ingest_world(WORLD, FS, str(tmp_path), episodes=4, frames=40, seed=0)
    before = files(tmp_path)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, crash)
    with pytest.raises(KeyboardInterrupt):
        ingest_world(WORLD, FS, str(tmp_path), episodes=5, frames=40, options=IngestOptions(overwrite=True))
    assert files(tmp_path) == before


def test_another_data_set_is_kept_unless_told(tmp_path: Path) -> None:
    first = ingest_world(WORLD, FS, str(tmp_path), episodes=4, frames=40, seed=0).manifest
    assert ingest_world(WORLD, FS, str(tmp_path), episodes=4, frames=40, seed=0).manifest == first
    before = files(tmp_path)
    with pytest.raises(DataError, match="another data set is at"):
        ingest_world(WORLD, FS, str(tmp_path), episodes=4, frames=40, seed=1)
    assert files(tmp_path) == before
    second = ingest_world(
        WORLD, FS, str(tmp_path), episodes=4, frames=40, seed=1, options=IngestOptions(overwrite=True)
    ).manifest
    assert second != first
    assert set(files(tmp_path)) == {"manifest.json", QUARANTINE_NAME, *(shard.name for shard in second.shards)}
    stored(FS, str(tmp_path))


def test_equal_settings_with_other_files_are_another_data_set(tmp_path: Path) -> None:
    make_video_folder(tmp_path / "videos", bad=False)
    first = ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/set").manifest
    before = files(tmp_path / "set")
    (tmp_path / "videos" / "h264.mkv").unlink()
    with pytest.raises(DataError, match="another data set is at"):
        ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/set")
    assert files(tmp_path / "set") == before
    options = IngestOptions(overwrite=True)
    assert ingest_folder(tmp_path / "videos", FS, f"{tmp_path}/set", options=options).manifest != first
    stored(FS, f"{tmp_path}/set")


def test_a_broken_manifest_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="manifest"):
        ingest_world(WORLD, FS, str(tmp_path), episodes=3, frames=40)
    ingest_world(WORLD, FS, str(tmp_path), episodes=3, frames=40, options=IngestOptions(overwrite=True))
    stored(FS, str(tmp_path))


def test_what_a_killed_ingest_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".incoming" / "old" / "train-00000.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    ingest_world(WORLD, FS, str(tmp_path), episodes=3, frames=40)
    assert not (tmp_path / ".incoming").exists()


def test_a_source_that_gives_frames_of_another_size_is_refused(tmp_path: Path) -> None:
    source = WorldSource(UnevenWorld((40, 40, 40), frame_size=64), 3, 40, 0)
    with pytest.raises(DataError, match=r"clip uneven-00000000:0: frames of \(32, 32\), the source says \(64, 64\)"):
        ingest(source, FS, f"{tmp_path}/set")


@pytest.mark.parametrize(
    "settings",
    [{"min_clip_frames": 1}, {"clip_frames": 8}, {"shard_bytes": 0}, {"row_group_bytes": 0}, {"row_group_clips": 0}],
)
def test_options_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="ingest: "):
        IngestOptions(**settings)


def test_names_and_codecs_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="data set name 'a/b'"):
        ingest_world(WORLD, FS, str(tmp_path), episodes=3, frames=40, name="a/b")
    with pytest.raises(SettingsError, match="min_clip_frames 200 is above the clip length 128"):
        ingest_world(WORLD, FS, str(tmp_path), episodes=3, frames=40, options=IngestOptions(min_clip_frames=200))
    codecs: list[Any] = ["none", "raw"]
    for codec in codecs:
        with pytest.raises(SettingsError, match=f"codec = '{codec}'. Choose auto or one of zstd, h264"):
            IngestOptions(codec=codec)
    assert not any(tmp_path.iterdir())


def test_the_same_in_a_bucket(tmp_path: Path, s3_server: Callable[[], str]) -> None:
    fs, path = FileSystem.from_uri(f"s3://{s3_server()}/sets/grid")
    options = IngestOptions(row_group_clips=2, shard_bytes=20_000)
    remote = ingest_world(WORLD, fs, path, episodes=12, frames=40, options=options)
    local = ingest_world(WORLD, FS, str(tmp_path), episodes=12, frames=40, options=options)
    assert len(remote.manifest.shards) > 3
    assert remote.manifest == local.manifest

    def objects() -> set[str]:
        listed = fs.get_file_info(FileSelector(path, recursive=True))
        return {info.path.removeprefix(f"{path}/") for info in listed if info.is_file}

    assert objects() == set(files(tmp_path))
    here, there = stored(FS, str(tmp_path)), stored(fs, path)
    assert set(here) == set(there)
    assert all(here[key][0] == there[key][0] and (here[key][1] == there[key][1]).all() for key in here)

    before = objects()
    for world in (UnevenWorld((40,) * 16, fail_at=12), WORLD):  # one fails half-way, one is another data set
        with pytest.raises((EnvironmentFault, DataError)):
            ingest_world(
                world, fs, path, episodes=16, frames=40, options=replace(options, overwrite=world is not WORLD)
            )
        assert objects() == before
        assert read_manifest(fs, path) == remote.manifest
    ingest_world(WORLD, fs, path, episodes=3, frames=40, options=IngestOptions(overwrite=True))
    assert len(objects()) == 5


def test_a_failure_leaves_no_object_in_a_bucket(s3_server: Callable[[], str]) -> None:
    fs, path = FileSystem.from_uri(f"s3://{s3_server()}/sets/uneven")
    world = UnevenWorld((40,) * 16, fail_at=12)
    with pytest.raises(EnvironmentFault):
        ingest_world(world, fs, path, episodes=16, frames=40, options=IngestOptions(row_group_clips=1))
    bucket = path.split("/")[0]
    assert not [info for info in fs.get_file_info(FileSelector(bucket, recursive=True)) if info.is_file]
    with pytest.raises(EnvironmentFault, match="cannot write the data set at none-such"):
        ingest_world(WORLD, fs, "none-such/sets/a", episodes=3, frames=40)
