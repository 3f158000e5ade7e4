"""A folder of real video files, good and bad, that tests ingest: one of each kind a user may have."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream

from flam_core.worlds.grid import GridWorld

OK = "ok"


def video_frames(count: int = 40, seed: int = 0, agents: int = 4) -> np.ndarray:
    """Frames to encode, uint8 [count, 128, 128, 3]."""
    return next(iter(GridWorld(agents=agents, frame_size=128).episodes(1, count, seed))).frames


def encode_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    fps: int = 10,
    times: list[float] | None = None,
    rotation: int = 0,
    audio_seconds: float = 0.0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Write `frames` as a video: at `fps`, or each at its time in `times` (seconds). `rotation` is for the player."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=48000) if audio_seconds else None
        for index, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, "rgb24")
            frame.pts = index if times is None else round(times[index] * 1000)
            frame.time_base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_silence(container, audio_seconds, sound)


def _add_silence(container: OutputContainer, seconds: float, stream: AudioStream) -> None:
    for start in range(0, round(seconds * 48000), 960):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        _add_silence(container, 1.0, container.add_stream("aac", rate=48000))


def _cut(path: Path, source: Path, share: float) -> None:
    path.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])


def make_video_folder(path: Path, *, frames: int = 40, bad: bool = True) -> dict[str, str]:
    """Write the folder; the path of each video below it, with "ok" or a part of the reason why it is bad.

    The good ones show the same `frames` frames, 10 a second; but `rate/variable.mp4` is unevenly spaced, and
    `rate/thirty.mp4` shows each three times, 30 a second. With `bad=False` there are good ones only. `notes.txt`,
    which nobody would take for a video, is there too and is not in the answer.
    """
    path.mkdir(parents=True, exist_ok=True)
    pictures = video_frames(frames)
    uneven = list(np.cumsum(np.random.default_rng(0).choice([0.05, 0.1, 0.2], size=frames)))
    lossless = {"crf": "0"}
    fast_vp9 = {"deadline": "realtime", "cpu-used": "8", "b": "2000000"}
    encode_video(path / "h264_444.mp4", pictures, pixels="yuv444p", options=lossless)
    encode_video(path / "h264_420.mp4", pictures)
    encode_video(path / "h264.mkv", pictures)
    encode_video(path / "vp9.webm", pictures, "libvpx-vp9", options=fast_vp9)
    encode_video(path / "mpeg4.avi", pictures, "mpeg4", options={"b": "2000000"})
    encode_video(path / "h264.mov", pictures)
    encode_video(path / "animated.gif", pictures, "gif", "rgb8")
    encode_video(path / "sound" / "longer_audio.mp4", pictures, audio_seconds=frames / 10 + 2)
    encode_video(path / "sound" / "longer_audio.mkv", pictures, audio_seconds=frames / 10 + 2)
    encode_video(path / "rate" / "variable.mp4", pictures, times=uneven)
    encode_video(path / "rate" / "thirty.mp4", np.repeat(pictures, 3, axis=0), fps=30)
    encode_video(path / "shape" / "UPPER.MP4", pictures)
    encode_video(path / "shape" / "wide.mp4", np.concatenate([pictures, pictures], axis=2))
    encode_video(path / "shape" / "small and tall.mkv", np.ascontiguousarray(pictures[:, :96, :48]))
    encode_video(path / "shape" / "turned.mp4", np.rot90(pictures, -1, axes=(1, 2)).copy(), rotation=90)
    (path / "notes.txt").write_text("not for you\n")
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "notes.txt"]
    expected = {file.relative_to(path).as_posix(): OK for file in files}
    return expected | (_make_bad(path / "bad", pictures) if bad else {})


def _make_bad(folder: Path, pictures: np.ndarray) -> dict[str, str]:
    folder.mkdir()
    encode_video(folder / "one_frame.mp4", pictures[:1])
    encode_video(folder / "truncated.mp4", pictures, container_options={"movflags": "faststart"})
    encode_video(folder / "whole.mkv", pictures)
    _cut(folder / "truncated.mp4", folder / "truncated.mp4", 0.6)
    _cut(folder / "truncated.mkv", folder / "whole.mkv", 0.6)
    _cut(folder / "truncated.gif", folder.parent / "animated.gif", 0.6)
    _cut(folder / "truncated.avi", folder.parent / "mpeg4.avi", 0.6)
    _cut(folder / "no_index.mp4", folder.parent / "h264_420.mp4", 0.6)
    (folder / "whole.mkv").unlink()
    _sound_only(folder / "sound_only.mp4")
    (folder / "text.mp4").write_text("I was a text file, and was renamed.\n" * 100)
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/part.ts\n#EXT-X-ENDLIST\n")
    (folder / "unknown_codec.mp4").write_bytes((folder.parent / "h264_420.mp4").read_bytes().replace(b"avc1", b"zzzz"))
    (folder / "empty.mkv").touch()
    return {
        "bad/one_frame.mp4": "1 frame: too short for a clip of",
        "bad/truncated.mp4": "frames decoded",
        "bad/truncated.mkv": "truncated: the file breaks off after",
        "bad/truncated.gif": "truncated: the file breaks off after",
        "bad/truncated.avi": "frames decoded",
        "bad/no_index.mp4": "0 frames decoded",
        "bad/sound_only.mp4": "no video stream",
        "bad/text.mp4": "not a video",
        "bad/playlist.mp4": "not a video",
        "bad/unknown_codec.mp4": "no decoder",
        "bad/empty.mkv": "empty file",
    }
