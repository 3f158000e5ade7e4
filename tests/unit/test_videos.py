"""Video files: every kind is decoded to one size and rate, and a bad one is told with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flam_core.data.videos import BadVideo, VideoChunk, VideoOptions, find_videos, read_video
from flam_core.errors import DataError, SettingsError
from tests.videos_fixture import OK, encode_video, make_video_folder, video_frames

COUNT = 40
PIXELS = VideoOptions(size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("videos")
    return path, make_video_folder(path, frames=COUNT)


def read(path: Path, options: VideoOptions = PIXELS, chunk: int = 16) -> tuple[np.ndarray, list[float], str | None]:
    """All frames, the rate of each chunk, and the reason why the file is bad."""
    frames, rates, reason = [np.empty((0, options.size, options.size, 3), dtype=np.uint8)], [], None
    for part in read_video(path, options, chunk):
        assert reason is None, "a BadVideo is the last"
        if isinstance(part, BadVideo):
            assert part.path == str(path)
            reason = part.reason
        else:
            assert part.frames.dtype == np.uint8
            assert len(part.frames) <= chunk
            frames.append(part.frames)
            rates.append(part.fps)
    return np.concatenate(frames), rates, reason


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize(
    ("name", "decibels"),
    [
        ("h264_444.mp4", 50),
        ("h264_420.mp4", 30),
        ("h264.mkv", 30),
        ("vp9.webm", 30),
        ("mpeg4.avi", 27),
        ("h264.mov", 30),
        ("animated.gif", 17),
        ("sound/longer_audio.mp4", 30),
        ("sound/longer_audio.mkv", 30),
        ("shape/UPPER.MP4", 30),
        ("shape/turned.mp4", 30),
        ("rate/variable.mp4", 30),
    ],
)
def test_every_kind_gives_the_pictures_that_went_in(
    folder: tuple[Path, dict[str, str]], name: str, decibels: float
) -> None:
    frames, rates, reason = read(folder[0] / name)
    assert reason is None
    assert frames.shape == (COUNT, 128, 128, 3)
    assert psnr(frames, video_frames(COUNT)) > decibels
    assert rates == [rates[0]] * 3
    assert "variable" in name or rates[0] == 10.0


def test_every_bad_file_gives_its_reason(folder: tuple[Path, dict[str, str]]) -> None:
    path, expected = folder
    bad = {name: reason for name, reason in expected.items() if reason != OK and "too short" not in reason}
    assert len(bad) >= 9
    for name, reason in bad.items():
        found = read(path / name)[2]
        assert found is not None, name
        assert reason in found, name
        assert "\n" not in found, name


def test_a_truncated_file_says_how_many_frames_came_before(folder: tuple[Path, dict[str, str]]) -> None:
    for name in ("truncated.mp4", "truncated.mkv", "truncated.gif", "truncated.avi"):
        frames, _, reason = read(folder[0] / "bad" / name, chunk=1)
        assert reason is not None
        assert 0 < len(frames) < COUNT, name
        assert f"{len(frames)} " in reason, name


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm", "mpeg4.avi", "animated.gif", "h264.mov", "faststart.mp4"])
def test_a_file_cut_anywhere_is_bad(
    folder: tuple[Path, dict[str, str]], tmp_path: Path, name: str, share: float
) -> None:
    source = folder[0] / name
    if name == "faststart.mp4":
        source = tmp_path / "whole.mp4"
        encode_video(source, video_frames(COUNT), container_options={"movflags": "faststart"})
    cut = tmp_path / f"cut{source.suffix}"
    cut.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    assert read(cut)[2] is not None


def test_a_file_that_is_gone_is_bad(tmp_path: Path) -> None:
    assert read(tmp_path / "gone.mp4")[2] == "cannot be read: No such file or directory"


def test_names_in_an_old_encoding_do_no_harm(folder: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    content = (folder[0] / "h264_420.mp4").read_bytes()
    assert b"VideoHandler" in content
    (tmp_path / "v.mp4").write_bytes(content.replace(b"VideoHandler", b"Vid\xe9oHandler"))
    assert len(read(tmp_path / "v.mp4")[0]) == COUNT


def test_a_playlist_opens_no_other_file(folder: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    target = folder[0] / "h264_420.mp4"
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{target}'\n")
    for name in ("list.mp4", "concat.mp4"):
        assert "not a video" in str(read(tmp_path / name)[2])


@pytest.mark.parametrize(("fps", "count"), [(10.0, 40), (5.0, 20), (20.0, 80), (4.0, 16), (3.0, 12)])
def test_a_steady_rate_is_resampled(folder: tuple[Path, dict[str, str]], fps: float, count: int) -> None:
    native = read(folder[0] / "h264_444.mp4")[0]
    for name in ("h264_444.mp4", "h264.mkv", "mpeg4.avi", "animated.gif"):
        frames, rates, _ = read(folder[0] / name, VideoOptions(size=128, fps=fps))
        assert len(frames) == count, name
        assert set(rates) == {fps}, name
    frames, _, _ = read(folder[0] / "h264_444.mp4", VideoOptions(size=128, fps=fps))
    far = np.abs(np.arange(COUNT) / 10 - np.arange(count)[:, None] / fps).round(6)  # [count, COUNT] in seconds
    np.testing.assert_array_equal(frames, native[far.argmin(axis=1)])  # of equals, argmin takes the first


def test_thirty_a_second_becomes_ten(folder: tuple[Path, dict[str, str]]) -> None:
    frames, _, _ = read(folder[0] / "rate" / "thirty.mp4", VideoOptions(size=128, fps=10.0))
    assert len(frames) == COUNT
    assert psnr(frames, video_frames(COUNT)) > 30


def test_an_uneven_rate_is_resampled_by_time(tmp_path: Path) -> None:
    pictures = video_frames(6)
    times = [1.0, 1.1, 1.5, 1.52, 2.0, 2.1]  # the first frame is at 0 of the episode
    encode_video(tmp_path / "v.mkv", pictures, pixels="yuv444p", times=times, options={"crf": "0"})
    frames, rates, _ = read(tmp_path / "v.mkv", VideoOptions(size=128, fps=10.0))
    assert set(rates) == {10.0}
    shown = [int(np.argmin([np.abs(frame.astype(int) - picture).mean() for picture in pictures])) for frame in frames]
    # Of times 0, 0.1, ... 1.1: 0.3 is as near to 0.1 as to 0.5 and goes to the earlier.
    assert shown[:12] == [0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5]


def test_a_jump_of_time_stamps_is_bad_rather_than_filled(tmp_path: Path) -> None:
    encode_video(tmp_path / "v.mp4", video_frames(3), times=[0.0, 0.1, 5000.0])
    frames, _, reason = read(tmp_path / "v.mp4", VideoOptions(size=64, fps=1000.0))
    assert reason is not None
    assert "time stamps jump by" in reason
    assert len(frames) < 1000
    assert read(tmp_path / "v.mp4")[2] is None, "frames as they are do not need time stamps"


@pytest.mark.parametrize("filter_", ["area", "bicubic"])
def test_fit(tmp_path: Path, filter_: Any) -> None:
    wide = np.zeros((2, 96, 192, 3), dtype=np.uint8)
    wide[:, :, :48], wide[:, :, 48:144], wide[:, :, 144:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    encode_video(tmp_path / "wide.mp4", wide, pixels="yuv444p", options={"crf": "0"})
    encode_video(tmp_path / "tall.mp4", wide.swapaxes(1, 2).copy(), pixels="yuv444p", options={"crf": "0"})
    for name in ("wide.mp4", "tall.mp4"):
        found = {}
        for fit in ("crop", "pad", "stretch"):
            frame = read(tmp_path / name, VideoOptions(size=64, fit=fit, filter=filter_))[0][0].astype(int)
            found[fit] = frame if name == "wide.mp4" else frame.swapaxes(0, 1)
        np.testing.assert_allclose(found["crop"][:, 4:-4], np.broadcast_to((0, 255, 0), (64, 56, 3)), atol=4)
        assert (found["pad"][:15] == 0).all()
        assert (found["pad"][-15:] == 0).all()
        np.testing.assert_allclose(found["pad"][17:47, :14], np.broadcast_to((255, 0, 0), (30, 14, 3)), atol=4)
        np.testing.assert_allclose(found["stretch"][:, -14:], np.broadcast_to((0, 0, 255), (64, 14, 3)), atol=4)


def test_frames_are_turned_before_they_are_shown(tmp_path: Path) -> None:
    pictures = np.zeros((2, 64, 128, 3), dtype=np.uint8)
    pictures[:, :, :64] = 255  # the left half is white
    for rotation, white in ((90, "bottom"), (-90, "top"), (180, "right"), (0, "left")):
        encode_video(tmp_path / "v.mp4", pictures, rotation=rotation)
        frame = read(tmp_path / "v.mp4", VideoOptions(size=64, fit="stretch"))[0][0].mean(axis=2)
        halves = {"top": frame[:24], "bottom": frame[-24:], "left": frame[:, :24], "right": frame[:, -24:]}
        assert max(halves, key=lambda side: halves[side].mean()) == white
        assert halves[white].mean() > 240


def test_chunks_do_not_change_the_frames(folder: tuple[Path, dict[str, str]]) -> None:
    path = folder[0] / "h264_420.mp4"
    sizes = [len(part.frames) for part in read_video(path, PIXELS, 16) if isinstance(part, VideoChunk)]
    assert sizes == [16, 16, 8]
    for options in (PIXELS, VideoOptions(size=128, fps=25.0)):
        np.testing.assert_array_equal(read(path, options, chunk=7)[0], read(path, options, chunk=1000)[0])


def test_a_reader_may_stop_early(folder: tuple[Path, dict[str, str]]) -> None:
    parts = read_video(folder[0] / "h264_420.mp4", PIXELS, 4)
    assert isinstance(next(parts), VideoChunk)


def test_find_videos(folder: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    path, expected = folder
    found = find_videos(path)
    assert {file.relative_to(path).as_posix() for file in found} == set(expected)
    assert found == sorted(found)
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="no video files in"):
        find_videos(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        find_videos(tmp_path / "none")


@pytest.mark.parametrize("settings", [{"size": 4}, {"fps": 0.0}, {"fps": -1.0}, {"fit": "zoom"}, {"filter": "nearest"}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"video: {next(iter(settings))}"):
        VideoOptions(**settings)
