"""Video as frames of one size: any container, size, shape and frame rate that FFmpeg reads, or frames one by one.

A file is decoded in one pass and never held whole. What is wrong with it is raised as `Unusable`, after whatever could
be decoded: a file that breaks off half-way is bad as a whole, and its reader must drop what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from flam_core.errors import DataError, SettingsError

SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"})

# Demuxers and protocols are named, so that a playlist in a file called .mp4 cannot make FFmpeg open other addresses.
_OPEN_OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi,gif", "protocol_whitelist": "file"}
_MAX_PIXELS = 1 << 26
"""Of a frame: 8,192 x 8,192. A file of a few bytes can claim more than there is memory for."""
_MAX_GAP = 60.0  # seconds between frames; more is a damaged time stamp, which would be filled with copies of a frame
_TIE = 1e-6  # seconds; time stamps in milliseconds or as fractions must not make rounding decide


@dataclass(frozen=True)
class VideoOptions:
    """How frames are brought to one size and rate."""

    size: int = 64
    """Height and width of the frames given, in pixels."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """What happens to frames that are not square: cut the longer side, add black bars, or distort."""
    fps: float | None = None
    """Frames a second, each the one nearest in time; None keeps the frames as they are (and as unevenly spaced)."""
    filter: Literal["area", "bicubic"] = "area"
    """How frames are scaled. Area does not ring at sharp edges; bicubic is crisper on camera video."""

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise SettingsError(f"video: size = {self.size}", fix="Choose 8 to 4096 pixels.")
        if self.fps is not None and not 0.0 < self.fps <= 1000.0:
            raise SettingsError(f"video: fps = {self.fps}", fix="Choose a rate above 0 and up to 1000, or none.")
        if self.fit not in ("crop", "pad", "stretch"):
            raise SettingsError(f"video: fit = {self.fit!r}", fix="Choose crop, pad or stretch.")
        if self.filter not in ("area", "bicubic"):
            raise SettingsError(f"video: filter = {self.filter!r}", fix="Choose area or bicubic.")


@dataclass(frozen=True)
class VideoChunk:
    """The next frames of a video."""

    frames: np.ndarray
    """uint8 [T, size, size, 3], RGB."""
    fps: float
    """Frames a second: the one asked for, else the file's average."""
    sources: np.ndarray
    """int64 [T]: which frame of the video each one shows, counted from 0."""
    boxes: np.ndarray
    """float32 [T, 4]: where the whole upright source frame lies, as (left, top, width, height) in units of `size`."""


@dataclass(frozen=True)
class BadVideo:
    """A file (or episode) that cannot be used, and why."""

    path: str
    reason: str


class Unusable(Exception):
    """Why a file or an episode cannot be used. Never leaves `flam_core.data`: who reads it makes it a `BadVideo`."""


@dataclass(frozen=True)
class OpenVideo:
    """A video being decoded."""

    frames: Iterator[VideoFrame]
    """All frames in order of display. Raises Unusable, with their number, if the file is damaged or breaks off."""
    rate: float
    """Frames a second on average; 0 if the file does not say."""
    aspect: float
    """Width of a stored pixel over its height."""


def find_videos(folder: Path) -> list[Path]:
    """All video files below `folder`, known by suffix in any case, sorted. Raises DataError if none is there."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", fix="Give a folder of video files.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"no video files in {folder}", fix=f"They must end in {', '.join(sorted(SUFFIXES))}.")
    return found


def read_video(path: Path, options: VideoOptions, chunk_frames: int) -> Iterator[VideoChunk | BadVideo]:
    """Yield the frames of `path` in chunks of `chunk_frames` (the last may be shorter), or end with a BadVideo."""
    try:
        yield from cut_video(path, options, chunk_frames)
    except Unusable as error:
        yield BadVideo(str(path), str(error))


def cut_video(
    video: Path | BinaryIO, options: VideoOptions, chunk_frames: int, expected: int | None = None
) -> Iterator[VideoChunk]:
    """Yield the frames of a video in chunks of `chunk_frames`; the last may be shorter.

    The first video stream is read, turned as its rotation says; audio and cover pictures are ignored. Raises Unusable
    if it is damaged or has not the `expected` number of frames.
    """
    with open_video(video) as opened:
        fps = options.fps or opened.rate
        if not fps:
            raise Unusable("the file does not say its frame rate: give one")
        timed = _timed(_counted(opened.frames, expected), 1.0 / (opened.rate or fps))
        yield from _chunks(timed, options, fps, opened.aspect, chunk_frames)


def cut_frames(
    frames: Iterable[VideoFrame],
    rate: float,
    options: VideoOptions,
    chunk_frames: int,
    *,
    aspect: float = 1.0,
    expected: int | None = None,
) -> Iterator[VideoChunk]:
    """As `cut_video`, of frames that come evenly, `rate` a second, whatever their time stamps say."""
    timed = ((one, one[0] / rate, 1.0 / rate) for one in _counted(frames, expected))
    yield from _chunks(timed, options, options.fps or rate, aspect, chunk_frames)


@contextmanager
def open_video(video: Path | BinaryIO, start: float = 0.0) -> Iterator[OpenVideo]:
    """The first video stream of a file or of an open binary file that can seek. Raises Unusable if there is none.

    With `start`, in seconds, frames may be left out that are not needed to decode from there on.
    """
    try:
        if not _size(video):
            raise Unusable("empty file (0 bytes)")
        container = _open(video)
    except OSError as error:
        raise _unreadable(error) from error
    with container:
        stream = _video_stream(container)
        if stream.codec_context is None:
            raise Unusable("no decoder for its video stream")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > _MAX_PIXELS:
            raise Unusable(f"frames of {width} x {height} pixels, more than {_MAX_PIXELS} in all")
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}  # where frames grow on the way
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate
        if start > 0:
            container.seek(int(start * 1_000_000))  # to the last frame at or before it that needs no other
        frames = _decode(container, stream, video)
        yield OpenVideo(frames, float(rate or 0), float(stream.sample_aspect_ratio or 1))


def _unreadable(error: OSError) -> Unusable:
    return Unusable(f"cannot be read: {error.strerror or error}")


def _bytes(video: Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """The content of a video from wherever it stands; an open file stays open."""
    return video.open("rb") if isinstance(video, Path) else nullcontext(video)


def _size(video: Path | BinaryIO) -> int:
    return video.stat().st_size if isinstance(video, Path) else video.seek(0, 2)


def _open(video: Path | BinaryIO) -> InputContainer:
    if not isinstance(video, Path):
        video.seek(0)
    try:
        file = str(video) if isinstance(video, Path) else video
        return av.open(file, mode="r", options=_OPEN_OPTIONS, metadata_errors="replace")  # titles in any old encoding
    except FFmpegError as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        with _bytes(video) as file:
            file.seek(0)
            head = file.read(12)
        if head[4:8] == b"ftyp":
            raise Unusable("truncated or damaged: its index (moov) cannot be read, 0 frames decoded") from error
        raise Unusable(f"not a video: {error.strerror}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise Unusable("no video stream")


def _decode(container: InputContainer, stream: VideoStream, video: Path | BinaryIO) -> Iterator[VideoFrame]:
    """All frames in order of display. Raises Unusable, with their number, if the file is damaged or breaks off."""
    count = 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise Unusable(f"truncated or damaged: {count} frames decoded before the damage")
            for frame in stream.decode(packet):
                if frame.is_corrupt:
                    raise Unusable(f"damaged: frame {count} is broken, {count} frames decoded before it")
                yield frame
                count += 1
    except FFmpegError as error:
        raise Unusable(f"truncated or damaged: {count} frames decoded, then {error.strerror}") from error
    except OSError as error:
        raise _unreadable(error) from error
    if not count:
        raise Unusable("no frame could be decoded")
    if _breaks_off(container, stream, video):
        raise Unusable(f"truncated: the file breaks off after {count} decoded frames")


def _breaks_off(container: InputContainer, stream: VideoStream, video: Path | BinaryIO) -> bool:
    """Whether a file that decoded without complaint is shorter than it says. FFmpeg itself takes that for its end."""
    size = _size(video)
    with _bytes(video) as file:
        file.seek(0)
        if "matroska" in container.format.name:
            return _matroska_end(file.read(4096)) > size
        if container.format.name == "avi":
            return 8 + int.from_bytes(file.read(8)[4:], "little") > size + 1  # some writers count a byte of padding
        if container.format.name == "gif":
            file.seek(-min(64, size), 2)
            return not file.read().rstrip(b"\0\r\n").endswith(b";")  # the trailer of a GIF
    return max((entry.pos + entry.size for entry in stream.index_entries), default=0) > size


def _matroska_end(head: bytes) -> int:
    """Where the segment of a Matroska or WebM file ends, in bytes; 0 if its header does not say (a live recording)."""

    def number(at: int) -> tuple[int, int]:
        """A number as Matroska writes it, and where it ends: the zero bits it begins with give its length."""
        length = 9 - head[at].bit_length()
        return int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1), at + length

    header, at = number(4)  # after the four bytes that mark a Matroska file
    at += header
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return 0
    segment, start = number(at + 4)
    unknown = segment == (1 << 7 * (start - at - 4)) - 1
    return 0 if unknown else start + segment


_Numbered = tuple[int, VideoFrame]
_Timed = tuple[_Numbered, float, float]
"""A frame with its number, the second it appears at (0 for the first, never decreasing), and the seconds it stays."""


def _counted(frames: Iterable[VideoFrame], expected: int | None) -> Iterator[_Numbered]:
    """Frames with their numbers. Raises Unusable unless there are as many as expected."""
    count = 0
    for frame in frames:
        if count == expected:
            raise Unusable(f"more frames than the {expected} of its ground truth")
        yield count, frame
        count += 1
    if expected is not None and count != expected:
        raise Unusable(f"{count} frames, but ground truth of {expected}")


def _timed(frames: Iterator[_Numbered], period: float) -> Iterator[_Timed]:
    """Frames with the times that their stamps say; one without says that it stays for `period` seconds."""
    start: float | None = None
    at = stays = 0.0
    for number, frame in frames:
        if start is None:
            start = frame.time or 0.0
        # Some old AVI files have no time stamps: a frame then follows on the one before.
        at = at + stays if frame.time is None else max(at, frame.time - start)
        stays = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else period
        yield (number, frame), at, stays


def _resampled(frames: Iterator[_Timed], fps: float) -> Iterator[_Numbered]:
    """The frame nearest to each time k / fps; of two equally near the earlier. The last one stands for its stay."""
    step = 0
    held: _Numbered | None = None
    held_at = held_stays = 0.0
    for frame, at, stays in frames:
        if at - held_at > _MAX_GAP:
            raise Unusable(f"time stamps jump by {at - held_at:.0f} s")
        while held is not None and step / fps <= (held_at + at) / 2 + _TIE:
            yield held
            step += 1
        held, held_at, held_stays = frame, at, stays
    while held is not None and step / fps < held_at + held_stays - _TIE:
        yield held
        step += 1


class _Fitter:
    """Brings frames to one size, sharing one scaler: making one for each frame costs several times the scaling."""

    def __init__(self, aspect: float, options: VideoOptions) -> None:
        self._options = options
        self._aspect = aspect
        self._scaler = VideoReformatter()
        kind = Interpolation.AREA if options.filter == "area" else Interpolation.BICUBIC
        # Full chroma and exact rounding: the same bytes on every processor, and no colour lost on pixel art.
        self._flags = kind | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def fit(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [size, size, 3], RGB, upright."""
        size = self._options.size
        width, height = self._scaled(frame)
        rgb = self._scaler.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=self._flags, threads=1
        ).to_ndarray()
        if self._options.fit == "pad":
            top, left = (size - height) // 2, (size - width) // 2
            rgb = np.pad(rgb, ((top, size - height - top), (left, size - width - left), (0, 0)))
        else:
            top, left = (height - size) // 2, (width - size) // 2
            rgb = rgb[top : top + size, left : left + size]
        return np.rot90(rgb, round(frame.rotation / 90))  # both count anticlockwise; the square fits either way

    def box(self, frame: VideoFrame) -> tuple[float, float, float, float]:
        """(left, top, width, height) of the whole frame, upright, in units of the fitted one's side."""
        size = self._options.size
        width, height = self._scaled(frame)
        if round(frame.rotation / 90) % 2:
            width, height = height, width
        return (size - width) // 2 / size, (size - height) // 2 / size, width / size, height / size

    def _scaled(self, frame: VideoFrame) -> tuple[int, int]:
        """(width, height) in whole pixels that a frame is scaled to before it is cut or padded."""
        size, width, height = self._options.size, frame.width * self._aspect, frame.height
        if self._options.fit == "stretch":
            return size, size
        if self._options.fit == "crop":
            scale = size / min(width, height)
            return max(size, round(width * scale)), max(size, round(height * scale))
        scale = size / max(width, height)
        return min(size, max(1, round(width * scale))), min(size, max(1, round(height * scale)))


def _chunks(
    timed: Iterator[_Timed], options: VideoOptions, fps: float, aspect: float, length: int
) -> Iterator[VideoChunk]:
    """Fitted frames at the rate asked for, `length` at a time. One that comes several times is fitted only once."""
    fitter = _Fitter(aspect, options)
    frames = _resampled(timed, options.fps) if options.fps is not None else (one for one, _, _ in timed)
    pictures: list[np.ndarray] = []
    numbers: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []

    def chunk() -> VideoChunk:
        return VideoChunk(np.stack(pictures), fps, np.asarray(numbers, np.int64), np.asarray(boxes, np.float32))

    try:
        for number, frame in frames:
            again = bool(numbers) and number == numbers[-1]
            pictures.append(pictures[-1] if again else fitter.fit(frame))
            boxes.append(boxes[-1] if again else fitter.box(frame))
            numbers.append(number)
            if len(numbers) == length:
                yield chunk()
                pictures, numbers, boxes = [], [], []
    except FFmpegError as error:  # in no known pixel format
        raise Unusable(f"cannot be read: {error.strerror or error}") from error
    if numbers:
        yield chunk()
