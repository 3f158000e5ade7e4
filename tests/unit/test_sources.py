"""Episodes from Python, the choice of a source by flags, and what docs/data.md says of both."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, LocalFileSystem, PyFileSystem

from flam_core.data.manifest import read_manifest
from flam_core.data.quarantine import BadClip, Quarantine
from flam_core.data.shard import Truth
from flam_core.data.sources import IteratorSource, SourceFlags, choose_source
from flam_core.data.sources.truth import make_truth
from flam_core.data.verify import verify_data
from flam_core.data.videos import Unusable, VideoOptions
from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.evaluation.held_out import held_out_clips
from tests.sources_fixture import (
    CAMERAS,
    FS,
    episodes,
    image_bytes,
    make_lerobot,
    picture_rows,
    store,
    video_bytes,
    write_parquet,
    write_tar,
)

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
EPISODES = episodes(4)


@dataclass(frozen=True)
class Place:
    """What an address resolves to."""

    fs: FileSystem
    path: str


def resolve(address: str) -> Place:
    return Place(LocalFileSystem(), address)


def test_episodes_of_all_kinds_come_back(tmp_path: Path) -> None:
    one = EPISODES[0]

    def all_kinds() -> Iterator[Any]:
        yield one
        yield EPISODES[1].frames
        yield EPISODES[2].frames, Truth(actions=EPISODES[2].actions)
        yield EPISODES[3].frames.astype(np.float32)
        yield one.frames[:20], Truth(positions=one.positions)
        yield one.frames, Truth(actions=one.actions, positions=one.positions[:, :1])
        yield one.frames[:, ::-1], Truth(rewards=np.arange(24))

    source = IteratorSource(name="mine", episodes=all_kinds(), fps=7.0, video=VideoOptions(size=32))
    report, stored = store(source, tmp_path / "set")
    assert set(stored) == {f"mine-0000000{i}" for i in (0, 1, 2, 6)}
    for i in range(3):
        np.testing.assert_array_equal(stored[f"mine-0000000{i}"].frames, EPISODES[i].frames)
    truth = stored["mine-00000000"].truth
    assert truth is not None
    np.testing.assert_array_equal(truth.actions, one.actions)
    np.testing.assert_allclose(truth.positions, one.positions, atol=1e-6)
    assert stored["mine-00000001"].truth is None
    truth = stored["mine-00000002"].truth
    assert truth is not None
    assert (truth.positions, truth.rewards, truth.entities) == (None, None, 2)
    truth = stored["mine-00000006"].truth
    assert truth is not None
    assert (truth.actions, truth.entities) == (None, None)
    np.testing.assert_array_equal(truth.rewards, np.arange(24))
    np.testing.assert_array_equal(stored["mine-00000006"].frames, one.frames[:, ::-1])
    assert {bad.path[-1]: bad.reason for bad in report.bad} == {
        "3": "frames are float32 [24, 32, 32, 3], not uint8 [T, H, W, 3]",
        "4": "20 frames, but ground truth of 24",
        "5": "actions of 2 entities, but positions of 1",
    }
    assert (report.manifest.fps, report.manifest.has_truth) == (7.0, False)
    with pytest.raises(SettingsError, match="fps = 0"):
        IteratorSource("mine", [], fps=0)


def test_data_with_part_of_the_truth_verifies_and_is_read_for_evaluation(tmp_path: Path) -> None:
    kinds = (
        Truth(actions=EPISODES[0].actions),
        Truth(positions=EPISODES[0].positions),
        Truth(rewards=np.zeros(24, np.float32)),
        Truth(EPISODES[0].actions, EPISODES[0].positions),
    )
    given = [(EPISODES[0].frames, kind) for kind in kinds for _ in range(2)]
    store(IteratorSource("mine", given, fps=7.0, video=VideoOptions(size=32)), tmp_path / "set")
    assert verify_data(FS, str(tmp_path / "set"), workers=1).bad_clips == 0
    manifest = read_manifest(FS, str(tmp_path / "set"))
    broken: list[BadClip] = []
    clips = [
        clip
        for split in ("train", "val", "test")
        for clip in held_out_clips(
            manifest, FS, str(tmp_path / "set"), split, 10, 99, quarantine=Quarantine(), on_broken=broken.append
        )
    ]
    assert not broken
    assert len(clips) == 16
    for clip in clips:
        kind = given[int(clip.episode[-1])][1]
        assert (clip.actions is None) == (kind.actions is None)
        assert (clip.positions is None) == (kind.positions is None)


def test_truth_of_one_entity_needs_no_axis_for_it() -> None:
    truth = make_truth({"actions": [1, 2, None], "positions": [[0.5, 0.25]] * 3, "rewards": None})
    assert truth is not None
    assert truth.actions is not None
    assert truth.positions is not None
    np.testing.assert_array_equal(truth.actions, np.array([1, 2, np.nan], np.float32)[:, None, None])
    assert truth.positions.shape == (3, 1, 2)
    assert make_truth({"actions": None}) is None
    assert make_truth({}) is None
    for wrong, reason in (
        ({"actions": [[[[1]]]]}, r"actions are \[1, 1, 1, 1\], not \[T, N, A\]"),
        ({"rewards": 3.0}, r"rewards are \[\], not \[T\]"),
        ({"rewards": [[1.0]]}, r"rewards are \[1, 1\]"),
        ({"rewards": []}, r"rewards are \[0\]"),
        ({"positions": [0.5, 0.5]}, r"positions are \[2\]"),
        ({"actions": "left"}, "not numbers"),
        ({"actions": [1, 2], "rewards": [1]}, "different lengths: actions 2, rewards 1"),
    ):
        with pytest.raises(Unusable, match=reason):
            make_truth(wrong)


@pytest.mark.parametrize("kind", ["world", "videos", "webdataset", "parquet", "lerobot"])
def test_each_flag_gives_its_source(kind: str) -> None:
    value: Any = Path("/a/clips") if kind == "videos" else "grid" if kind == "world" else "/a/clips"
    source = choose_source(replace(SourceFlags(size=48), **{kind: value}), 3, resolve)
    assert source.frame_size == (48, 48)
    assert source.name == ("grid" if kind == "world" else "clips")
    assert "/a/" not in source.description


def test_flags_reach_the_source() -> None:
    flags = SourceFlags(parquet="p", image_column="i", episode_column="e", index_column="n", image_fps=4.0, fit="pad")
    settings = choose_source(flags, 0, resolve).settings
    assert settings["parquet.image_column"] == "i"
    assert settings["parquet.episode_column"] == "e"
    assert settings["parquet.index_column"] == "n"
    assert settings["parquet.image_fps"] == 4.0
    assert settings["video.fit"] == "pad"
    assert choose_source(SourceFlags(lerobot="l", camera="c", fps=5.0), 0, resolve).settings["video.fps"] == 5.0
    world = choose_source(SourceFlags(world="grid", option=("agents=5",)), 0, resolve)
    assert "agents=5" in world.description


def test_flags_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingsError, match="give one of --webdataset, --parquet, --lerobot, --world or --videos"):
        choose_source(SourceFlags(), 0, resolve)
    with pytest.raises(SettingsError, match="give one of"):
        choose_source(SourceFlags(world="grid", parquet="p"), 0, resolve)
    with pytest.raises(SettingsError, match=r"--camera does not go with --parquet. It is for --lerobot"):
        choose_source(SourceFlags(parquet="p", camera="c"), 0, resolve)
    with pytest.raises(SettingsError, match="--image_fps does not go with --videos"):
        choose_source(SourceFlags(videos=Path("v"), image_fps=3.0), 0, resolve)
    with pytest.raises(SettingsError, match=r"--option agents is not name=value"):
        choose_source(SourceFlags(world="grid", option=("agents",)), 0, resolve)


class FailingDisk(FileSystemHandler):
    """The local disk, but files of some names open and then cannot be read."""

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def get_type_name(self) -> str:
        return "failing"

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return FS.get_file_info(paths)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return FS.get_file_info(selector)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(FailingFile(path) if path.endswith(self.failing) else io.FileIO(path), mode="r")

    def _never(self, *_: Any) -> Any:
        raise AssertionError("a source only reads")

    open_input_stream = open_input_file
    open_output_stream = open_append_stream = create_dir = delete_dir = delete_dir_contents = _never
    delete_root_dir_contents = delete_file = move = copy_file = normalize_path = _never


class FailingFile(io.FileIO):
    """Whose disk has gone."""

    def read(self, size: int | None = -1) -> bytes:
        raise OSError("the storage does not answer")


@pytest.mark.parametrize(
    ("kind", "failing"),
    [
        ("webdataset", ".tar"),
        ("parquet", ".parquet"),
        ("lerobot", ".json"),
        ("lerobot", ".parquet"),
        ("lerobot", ".mp4"),
    ],
)
def test_a_storage_that_fails_is_not_taken_for_damaged_data(tmp_path: Path, kind: str, failing: str) -> None:
    write_tar(
        tmp_path / "webdataset" / "a.tar", {f"{i}.mp4": video_bytes(one.frames) for i, one in enumerate(EPISODES)}
    )
    write_parquet(tmp_path / "parquet" / "a.parquet", picture_rows(EPISODES))
    make_lerobot(tmp_path / "lerobot")
    place = Place(PyFileSystem(FailingDisk(failing)), str(tmp_path / kind))
    flags: dict[str, Any] = {kind: "x"} | ({"camera": CAMERAS[0]} if kind == "lerobot" else {})
    flags |= {"image_fps": 10.0} if kind == "parquet" else {}
    with pytest.raises(EnvironmentFault, match=r"cannot read .*the storage does not answer"):
        store(choose_source(SourceFlags(**flags), 0, lambda _: place), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"my_recordings": lambda: [(one.frames, one.actions) for one in EPISODES]}
    exec(code, found)  # what docs/data.md tells people to run
    manifest = read_manifest(FS, str(tmp_path / "data" / "mine"))
    assert (manifest.name, manifest.frame_size, manifest.frames) == ("mine", (64, 64), 96)
    assert manifest.episodes == {"train": 2, "val": 1, "test": 1}
    assert len(code.split("episodes = ")[1].splitlines()) <= 10


def test_the_flags_of_the_docs_exist() -> None:
    known = {field.name for field in fields(SourceFlags)} | {"out"}
    named = set(re.findall(r"--(\w+)", DOCS))
    assert {"webdataset", "parquet", "lerobot", "camera", "video_column"} <= named
    assert named <= known


def test_a_camera_stored_as_pictures_is_read_as_the_message_says(tmp_path: Path) -> None:
    """The rows of LeRobot's data files are rows of pictures to the Parquet source."""
    tree = make_lerobot(tmp_path / "robot", count=3)
    data = tree.root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    pictures = [image_bytes(frame) for frames in tree.cameras["observation.images.top"] for frame in frames]
    structs = pa.array([{"bytes": content, "path": "x.png"} for content in pictures])
    pq.write_table(table.append_column("observation.images.top", structs), data)
    flags = SourceFlags(parquet=str(tree.root / "data"), image_column="observation.images.top", image_fps=10.0, size=32)
    _, stored = store(choose_source(flags, 0, resolve), tmp_path / "set")
    for i in range(3):
        found = stored[str(i)]
        np.testing.assert_array_equal(found.frames, tree.cameras["observation.images.top"][i][: len(found.frames)])
        assert found.truth is not None
        np.testing.assert_array_equal(found.truth.actions, tree.actions[i][: len(found.frames), None])
