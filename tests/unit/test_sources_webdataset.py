"""WebDataset archives: what goes in as samples comes out as episodes, and a bad sample is named."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow.fs import SubTreeFileSystem

from flam_core.data.sources import WebDatasetSource, webdataset
from flam_core.data.videos import VideoOptions
from flam_core.errors import DataError, SettingsError
from tests.sources_fixture import (
    FS,
    episodes,
    image_bytes,
    npz_bytes,
    store,
    truth_json,
    video_bytes,
    write_tar,
)

VIDEO = VideoOptions(size=32)
EPISODES = episodes(4)


def source(path: Path | str, image_fps: float | None = None, video: VideoOptions = VIDEO) -> WebDatasetSource:
    return WebDatasetSource(FS, str(path), video, "CC0-1.0", image_fps)


def test_videos_with_truth_come_back(tmp_path: Path) -> None:
    members = {}
    for i, episode in enumerate(EPISODES):
        members[f"./clips/ep{i}.mp4"] = video_bytes(episode.frames)
        members[f"./clips/ep{i}.json"] = truth_json(episode, rewards=list(range(24)), caption="two agents")
        members[f"./clips/ep{i}.txt"] = b"a caption, passed over"
        members[f"./clips/ep{i}.jpg"] = image_bytes(episode.frames[0], "JPEG")
    write_tar(tmp_path / "in" / "train-000.tar", members)
    report, stored = store(source(tmp_path / "in"), tmp_path / "set")
    assert report.bad == ()
    assert set(stored) == {f"train-000/clips/ep{i}" for i in range(4)}
    for i, episode in enumerate(EPISODES):
        found = stored[f"train-000/clips/ep{i}"]
        np.testing.assert_allclose(found.frames.astype(int), episode.frames, atol=3)
        assert found.truth is not None
        np.testing.assert_array_equal(found.truth.actions, episode.actions)
        np.testing.assert_allclose(found.truth.positions, episode.positions, atol=1e-6)
        np.testing.assert_array_equal(found.truth.rewards, np.arange(24))
    manifest = report.manifest
    assert (manifest.source, manifest.licence, manifest.fps, manifest.has_truth) == (
        "WebDataset in", "CC0-1.0", 10.0, True,
    )  # fmt: skip
    assert str(tmp_path) not in manifest.to_json().decode()


def test_several_archives_of_every_kind_of_file(tmp_path: Path) -> None:
    """Equal keys in two archives are two episodes; compressed archives and patterns work; so does a single file."""
    frames = EPISODES[0].frames
    for name, mode in (("a-0.tar", "w"), ("a-1.tar.gz", "w:gz"), ("b.tgz", "w:gz")):
        content = {"x.mkv": video_bytes(frames, form="mkv"), "y.avi": video_bytes(frames, form="avi")}
        write_tar(tmp_path / "in" / "deep" / name, content, mode)
    _, stored = store(source(tmp_path / "in"), tmp_path / "set")
    assert set(stored) == {f"deep/{tar}/{key}" for tar in ("a-0", "a-1", "b") for key in "xy"}
    _, stored = store(source(f"{tmp_path}/in/deep/a-*"), tmp_path / "some")
    assert set(stored) == {f"{tar}/{key}" for tar in ("a-0", "a-1") for key in "xy"}
    members = {f"{key}.mp4": video_bytes(frames) for key in "xyz"}
    report, stored = store(source(write_tar(tmp_path / "one.tar", members)), tmp_path / "single")
    assert set(stored) == {f"one/{key}" for key in "xyz"}
    assert report.manifest.name == "one"


@pytest.mark.parametrize("pattern", ["ep{}/{:04d}.png", "ep{}_{:04d}.png", "ep{}.{}.png", "ep{}/frame-{}.png"])
@pytest.mark.parametrize("json_first", [True, False])
def test_runs_of_pictures_are_episodes(tmp_path: Path, pattern: str, json_first: bool) -> None:
    """Ordered by number, not by name: unpadded numbers sort wrongly."""
    members = {}
    for i, episode in enumerate(EPISODES[:3]):
        key = pattern.format(i, 7).removesuffix("7.png").removesuffix("000").rstrip("/._-")
        truth = {f"{key}.json": truth_json(episode, fps=5)}
        pictures = {pattern.format(i, t): image_bytes(frame) for t, frame in enumerate(episode.frames)}
        pictures = dict(sorted(pictures.items()))
        members |= truth | pictures if json_first else pictures | truth
    write_tar(tmp_path / "t.tar", members)
    report, stored = store(source(tmp_path / "t.tar"), tmp_path / "set")
    assert report.bad == ()
    assert len(stored) == 3
    for name, episode in zip(sorted(stored), EPISODES, strict=False):
        np.testing.assert_array_equal(stored[name].frames, episode.frames)
        np.testing.assert_array_equal(stored[name].truth.actions, episode.actions)
        assert stored[name].fps == 5.0


def test_truth_a_picture_and_archives_of_one_episode(tmp_path: Path) -> None:
    for i, episode in enumerate(EPISODES[:3]):
        members = {}
        for t, frame in enumerate(episode.frames):
            members[f"{t:06d}.png"] = image_bytes(frame)
            members[f"{t:06d}.json"] = json.dumps({"actions": episode.actions[t].tolist(), "rewards": t}).encode()
        write_tar(tmp_path / "in" / f"ep{i}.tar", members)
    report, stored = store(source(tmp_path / "in", image_fps=8.0), tmp_path / "set")
    assert set(stored) == {"ep0", "ep1", "ep2"}
    for i in range(3):
        truth = stored[f"ep{i}"].truth
        np.testing.assert_array_equal(truth.actions, EPISODES[i].actions)
        np.testing.assert_array_equal(truth.rewards, np.arange(24))
        assert truth.positions is None
    assert not report.manifest.has_truth, "positions are missing"


def test_truth_in_numpy_files_and_of_one_entity(tmp_path: Path) -> None:
    episode = EPISODES[0]
    plain = io.BytesIO()
    np.save(plain, episode.positions[:, 0])
    members = {
        "a.mp4": video_bytes(episode.frames),
        "a.npz": npz_bytes(actions=episode.actions, positions=episode.positions, other=np.zeros(3)),
        "b.mp4": video_bytes(episode.frames),
        "b.positions.npy": plain.getvalue(),
        "c.mp4": video_bytes(episode.frames),
        "c.json": json.dumps({"actions": episode.actions[:, 0].tolist()}).encode(),
    }
    _, stored = store(source(write_tar(tmp_path / "t.tar", members)), tmp_path / "set")
    np.testing.assert_array_equal(stored["t/a"].truth.actions, episode.actions)
    np.testing.assert_allclose(stored["t/b"].truth.positions, episode.positions[:, :1], atol=1e-6)
    assert stored["t/b"].truth.actions is None
    np.testing.assert_array_equal(stored["t/c"].truth.actions, episode.actions[:, :1])


class _Runs:
    """Unpickling it would make the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


def test_bad_samples_are_named_with_their_reason(tmp_path: Path) -> None:
    episode, good = EPISODES[0], video_bytes(EPISODES[0].frames)
    marker = tmp_path / "ran"
    objects = io.BytesIO()
    np.savez(objects, actions=np.array([_Runs(marker)], dtype=object))
    members = {f"good{i}.mp4": good for i in range(3)}
    picture = {t: image_bytes(frame) for t, frame in enumerate(episode.frames[:8])}
    members |= {"cut.mp4": good[: len(good) // 2]}
    members |= {"lonely.json": truth_json(episode)}
    members |= {"pickled.mp4": good, "pickled.pkl": pickle.dumps(_Runs(marker))}
    members |= {"objects.mp4": good, "objects.npz": objects.getvalue()}
    members |= {"short.mp4": good, "short.json": json.dumps({"actions": episode.actions[:-1].tolist()}).encode()}
    members |= {"long.mp4": good, "long.json": json.dumps({"rewards": [0] * 25}).encode()}
    members |= {"shape.mp4": good, "shape.json": json.dumps({"positions": [[[0, 0, 0]]] * 24}).encode()}
    members |= {"ragged.mp4": good, "ragged.json": json.dumps({"actions": [[1], [1, 2]]}).encode()}
    members |= {"text.mp4": good, "text.json": b"{not json"}
    members |= {"two.a.mp4": good, "two.b.mp4": good}
    members |= {"unnamed.mp4": good, "unnamed.npy": npz_bytes(a=np.zeros(3))}
    members |= {f"gap/{t + (t > 4)}.png": content for t, content in picture.items()}
    members |= {f"torn/{t}.png": content[: len(content) // (2 if t == 3 else 1)] for t, content in picture.items()}
    members |= {f"fake/{t}.png": b"no picture" if t == 5 else content for t, content in picture.items()}
    members |= {"good0.mp4 ": b"", "good0.txt": b"again"}
    expected = {
        "cut": "index (moov) cannot be read",
        "lonely": "no video and no pictures, only lonely.json",
        "pickled": "pickled.pkl is a pickle",
        "objects": "objects.npz: cannot be read: Object arrays cannot be loaded",
        "short": "more frames than the 23 of its ground truth",
        "long": "24 frames, but ground truth of 25",
        "shape": "positions are [24, 1, 3], not [T, N, 2]",
        "ragged": "actions are not numbers of one regular shape",
        "text": "text.json: cannot be read: Expecting property name",
        "two": "several videos in one sample: two.a.mp4, two.b.mp4",
        "unnamed": "say what it holds: unnamed.actions.npy",
        "gap": "picture goes from 4 to 6",
        "torn": "image 3.png: damaged",
        "fake": "image 5.png: not a picture",
        "good0": "an episode of this name came before",
    }
    report, stored = store(source(write_tar(tmp_path / "t.tar", members), image_fps=10.0), tmp_path / "set")
    assert set(stored) == {f"t/good{i}" for i in range(3)}
    reasons = {bad.path.removeprefix("t/"): bad.reason for bad in report.bad}
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], name
        assert "\n" not in reasons[name]
    assert not marker.exists()


def gif_bytes(frames: np.ndarray) -> bytes:
    out = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(out, "GIF", save_all=True, append_images=rest)
    return out.getvalue()


def test_a_small_archive_that_unpacks_to_much_is_bad_episodes_and_no_more(tmp_path: Path) -> None:
    """Bombs and paths that lead out: named, left out, and nothing is written beside the data set."""
    good = video_bytes(EPISODES[0].frames)
    zeros = np.zeros(65 << 20, np.uint8)
    packed = io.BytesIO()
    np.savez_compressed(packed, rewards=zeros)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117)
    claims = b"\x93NUMPY\x01\x00v\x00" + header + b"\n"
    gif = bytearray(gif_bytes(EPISODES[0].frames))
    gif[6:10] = b"\x10\x27\x10\x27"  # it claims 10,000 x 10,000 pixels
    members = {
        "../../out.mp4": good,
        "/absolute/path.mp4": good,
        "good.mp4": good,
        "zeros.mp4": good,
        "zeros.json": bytes(65 << 20),
        "packed.mp4": good,
        "packed.npz": packed.getvalue(),
        "claims.mp4": good,
        "claims.rewards.npy": claims,
        "deep.mp4": good,
        "deep.json": b"[" * 200_000,
        "wide.gif": bytes(gif),
    }
    home = tmp_path / "a" / "b"
    archive = write_tar(home / "t.tar.gz", members, "w:gz")
    assert archive.stat().st_size < 1 << 20
    report, stored = store(source(archive), home / "set")
    assert set(stored) == {"t/../../out", "t/absolute/path", "t/good"}  # names, not places
    expected = {
        "zeros": "zeros.json has 68157440 bytes, more than 67108864",
        "packed": "packed.npz: unpacks to more than",
        "claims": "claims.rewards.npy: cannot be read",
        "deep": "deep.json: nested too deeply",
        "wide": "frames of 10000 x 10000 pixels",
    }
    reasons = {bad.path.removeprefix("t/"): bad.reason for bad in report.bad}
    assert set(reasons) == set(expected)
    assert all(words in reasons[name] for name, words in expected.items()), reasons
    assert {place.name for place in home.iterdir()} == {"t.tar.gz", "set"}
    assert {place.name for place in tmp_path.rglob("*.mp4")} == set()


def test_an_episode_that_is_too_large_as_it_is_stored_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "_MOST_EPISODE", 1 << 16)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    members = {f"long/{i}.png": image_bytes(noise) for i in range(8)}
    members |= {f"good{i}.mp4": video_bytes(EPISODES[i].frames) for i in range(3)}
    report, stored = store(source(write_tar(tmp_path / "t.tar", members), image_fps=10.0), tmp_path / "set")
    assert set(stored) == {f"t/good{i}" for i in range(3)}
    (bad,) = report.bad
    assert bad.reason == "more than 65536 bytes in one episode"


def test_of_a_sample_no_more_is_read_than_an_episode_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_MOST_EPISODE", 1 << 16)
    archive = write_tar(tmp_path / "t.tar", {f"ep.a{i}.mp4": bytes(1 << 14) for i in range(8)})
    (sample,) = webdataset._samples(FS, str(archive))
    assert sum(map(len, sample.members.values())) == sample.size == 1 << 16
    assert sample.refused == "ep.a7.mp4 has 16384 bytes, more than 0"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_breaks_off_gives_what_came_before(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)  # noise: nothing that gzip could make small
    noise = [rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8) for _ in range(6)]
    whole = write_tar(
        tmp_path / "in" / "a.tar", {f"v{i}.mp4": video_bytes(frames) for i, frames in enumerate(noise)}, mode
    )
    whole.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.75)])
    (tmp_path / "in" / "empty.tar").touch()
    (tmp_path / "in" / "text.tar").write_text("no archive" * 100)
    report, stored = store(source(tmp_path / "in"), tmp_path / "set")
    assert set(stored) == {f"a/v{i}" for i in range(4)}
    reasons = {bad.path: bad.reason for bad in report.bad}
    assert set(reasons) == {"a/v4", "empty.tar", "text.tar"}
    assert "the archive is truncated or damaged here" in reasons["a/v4"]
    assert "not a tar archive" in reasons["empty.tar"]
    assert "not a tar archive" in reasons["text.tar"]


def test_frames_of_other_shapes_are_fitted_and_positions_move_with_them(tmp_path: Path) -> None:
    """A wide frame with a white square: cropped, its left and right are gone; a position there becomes NaN."""
    frames = np.zeros((10, 32, 64, 3), dtype=np.uint8)
    frames[:, 8:16, 24:32] = 255  # its centre is at (28/64, 12/32)
    positions = np.broadcast_to(np.array([[28 / 64, 12 / 32], [0.05, 0.5]], dtype=np.float32), (10, 2, 2))
    members = {}
    for key in "abc":
        members[f"{key}.mp4"] = video_bytes(frames)
        members[f"{key}.npz"] = npz_bytes(positions=positions)
    path = write_tar(tmp_path / "t.tar", members)
    centres = {"crop": (12 / 32, 12 / 32), "pad": (28 / 64, 0.25 + 6 / 32), "stretch": (28 / 64, 12 / 32)}
    for fit, centre in centres.items():
        options = VideoOptions(size=32, fit=fit)  # pyright: ignore[reportArgumentType]
        _, stored = store(source(path, video=options), tmp_path / fit)
        found = stored["t/a"]
        rows, columns = np.nonzero(found.frames[0].mean(axis=-1) > 128)
        np.testing.assert_allclose(((columns.mean() + 0.5) / 32, (rows.mean() + 0.5) / 32), centre, atol=0.02)
        np.testing.assert_allclose(found.truth.positions[:, 0], np.broadcast_to(centre, (10, 2)), atol=1e-6)
        assert np.isnan(found.truth.positions[:, 1]).all() == (fit == "crop")


def test_resampling_takes_the_truth_along(tmp_path: Path) -> None:
    members = {}
    for key in "abc":
        members[f"{key}.mp4"] = video_bytes(EPISODES[0].frames)
        members[f"{key}.json"] = truth_json(EPISODES[0])
    _, stored = store(source(write_tar(tmp_path / "t.tar", members), video=VideoOptions(32, fps=5.0)), tmp_path / "set")
    found = stored["t/a"]
    assert (found.fps, len(found.frames)) == (5.0, 10)
    np.testing.assert_allclose(found.frames.astype(int), EPISODES[0].frames[:20:2], atol=3)
    np.testing.assert_array_equal(found.truth.actions, EPISODES[0].actions[:20:2])


def test_other_file_systems_are_read_as_streams(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "t.tar", {f"{key}.mp4": video_bytes(EPISODES[0].frames) for key in "abc"})
    fs = SubTreeFileSystem(str(tmp_path), FS)
    _, stored = store(WebDatasetSource(fs, "in", VIDEO), tmp_path / "set")
    assert set(stored) == {"t/a", "t/b", "t/c"}


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"no tar archives in .*They must end in"):
        store(source(tmp_path / "in"), tmp_path / "set")
    with pytest.raises(DataError, match=r"inn does not exist. Did you mean 'in'"):
        store(source(tmp_path / "inn"), tmp_path / "set")
    with pytest.raises(DataError, match=r"no tar archives in .*x-"):
        store(source(tmp_path / "in" / "x-*.tar"), tmp_path / "set")
    write_tar(tmp_path / "in" / "t.tar", {f"a/{t}.png": image_bytes(f) for t, f in enumerate(EPISODES[0].frames)})
    with pytest.raises(SettingsError, match=r"t/a: its pictures do not say how many a second.*--image_fps"):
        store(source(tmp_path / "in"), tmp_path / "set")
    assert not (tmp_path / "set").exists()
