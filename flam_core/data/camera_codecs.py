"""Codecs for camera video, which lossless coding hardly makes smaller: H.264 over a clip, or a JPEG a frame.

Equal payloads give equal pixels on every machine: one thread, exact rounding, and colours converted as written here,
never as a library guesses. Decoding them is work for CPU nodes, about a twentieth as fast as zstd.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.codec import CodecContext
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image

from flam_core.errors import DataError

_BT709 = 1  # AVCOL_SPC_BT709, for which PyAV has no name
_RATE = 25  # nominal, since x264's crf means a quality at this rate; a clip's own rate is in its row
_JPEG_QUALITY = 95

# Chroma is averaged and interpolated, not picked from every second pixel; the same bytes on every processor.
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)


class H264:
    """One MP4 a clip: a key frame every 16 frames, no B-frames, tuned for fast decoding, BT.709 in limited range."""

    heavy = True
    lossless = False

    def __init__(self, name: str, pixels: str, crf: int) -> None:
        """`pixels` is yuv420p or yuv444p; `crf` is x264's quality, of which 6 more is about half the bytes."""
        self.name, self.pixels, self.crf = name, pixels, crf

    def encode(self, frames: np.ndarray) -> bytes:
        """See `Codec.encode`."""
        frames = self._even(frames)
        # No key frames at cuts: noise alone passes for cuts in small frames.
        options = {"crf": str(self.crf), "g": "16", "bf": "0", "sc_threshold": "0", "tune": "fastdecode"}
        # Else x264 chooses algorithms by what the processor has, and other processors give other bytes.
        options["x264-params"] = "cpu-independent=1"
        # Where the scaler puts chroma. Untagged it would be read as lying to the left: colours shift by half a pixel.
        options["chroma_sample_location"] = "center"
        file = io.BytesIO()
        # Without `bitexact` the payload would name the version of the library that wrote it.
        with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=_RATE, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = self.pixels
            context = stream.codec_context
            context.thread_count = 1  # x264 divides its work by the number of threads: other threads, other bytes
            context.colorspace, context.color_range = _BT709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            for index, pixels in enumerate(frames):
                frame = _LOCAL.scaler.reformat(
                    VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
                    format=self.pixels,
                    dst_colorspace=Colorspace.ITU709,
                    src_color_range=ColorRange.JPEG,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_SCALING,
                    threads=1,
                )
                frame.pts, frame.time_base = index, Fraction(1, _RATE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return file.getvalue()

    def decode(self, payload: bytes | memoryview, frames: int, height: int, width: int) -> np.ndarray:
        """See `Codec.decode`."""
        coded = (height + height % 2, width + width % 2) if self._halved else (height, width)
        pictures = self._pictures(payload, frames, *coded)
        shape = (frames, height, width)
        return _collect(self.name, pictures, shape, coded, self.pixels, Colorspace.ITU709, ColorRange.MPEG)

    @property
    def _halved(self) -> bool:
        """Whether chroma has half the height and width, so that both must be even."""
        return self.pixels == "yuv420p"

    def _even(self, frames: np.ndarray) -> np.ndarray:
        """Frames whose last row and column are repeated where the format wants an even number."""
        _, height, width, _ = frames.shape
        if not self._halved or not (height % 2 or width % 2):
            return frames
        return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    def _pictures(self, payload: bytes | memoryview, frames: int, height: int, width: int) -> Iterator[VideoFrame]:
        """The decoded frames, as far as the header promises the clip that is due."""
        limit = {"max_pixels": _max_pixels(height, width)}
        try:
            with av.open(io.BytesIO(payload), "r", "mov", options=limit, metadata_errors="ignore") as container:
                videos = container.streams.video
                stream = videos[0] if len(videos) == len(container.streams) == 1 else None
                if stream is None or stream.codec_context is None or stream.codec_context.name != "h264":
                    raise DataError(f"{self.name} payload is no MP4 with one H.264 stream")
                context = stream.codec_context
                if (stream.frames, context.height, context.width) != (frames, height, width):
                    raise DataError(
                        f"{self.name} payload holds {stream.frames} frames of {context.height} x {context.width}, "
                        f"not {frames} of {height} x {width}"
                    )
                context.thread_count = 1
                # Damage must be an error: by default the decoder paints over it.
                context.options = {"err_detect": "explode", **limit}
                yield from container.decode(stream)
        except FFmpegError as error:
            raise DataError(f"{self.name} payload does not decode: {error.strerror}") from error


H264_420 = H264("h264", "yuv420p", 18)
"""For camera video."""
H264_444 = H264("h264-444", "yuv444p", 10)
"""For video that is too noisy for zstd but has sharp colours, which half-resolution chroma would smear."""


class Jpeg:
    """A JPEG for each frame, in full chroma.

    The payload begins with the number of frames and the length of each in bytes, all uint32 little-endian.
    """

    name = "jpeg"
    heavy = True
    lossless = False

    def encode(self, frames: np.ndarray) -> bytes:
        """See `Codec.encode`."""
        files: list[bytes] = []
        for pixels in frames:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
            files.append(file.getvalue())
        return struct.pack(f"<{1 + len(files)}I", len(files), *map(len, files)) + b"".join(files)

    def decode(self, payload: bytes | memoryview, frames: int, height: int, width: int) -> np.ndarray:
        """See `Codec.decode`."""
        pictures = self._pictures(memoryview(payload), frames, height, width)
        shape = (frames, height, width)
        return _collect(self.name, pictures, shape, shape[1:], "yuvj444p", Colorspace.ITU601, ColorRange.JPEG)

    def _pictures(self, payload: memoryview, frames: int, height: int, width: int) -> Iterator[VideoFrame]:
        count = int.from_bytes(payload[:4], "little")
        start = 4 * (1 + count)
        if count != frames or len(payload) < start:
            raise DataError(f"jpeg payload of {len(payload)} bytes announces {count} frames, not {frames}")
        lengths = struct.unpack(f"<{count}I", payload[4:start])
        if start + sum(lengths) != len(payload):
            raise DataError(f"jpeg payload has {len(payload)} bytes, its header says {start + sum(lengths)}")
        decoder = CodecContext.create("mjpeg", "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.thread_count = 1
        # The plain inverse transform is the one that is the same on every processor.
        decoder.options = {"idct": "simple", "err_detect": "explode", "max_pixels": _max_pixels(height, width)}
        try:
            for index, length in enumerate(lengths):
                file = bytes(payload[start : start + length])
                # The decoder makes do with half a file, and takes an empty one for the end of the video.
                if not (file.startswith(b"\xff\xd8") and file.endswith(b"\xff\xd9")):
                    raise DataError(f"jpeg payload: frame {index} is no whole JPEG")
                yield from decoder.decode(Packet(file))
                start += length
        except FFmpegError as error:
            raise DataError(f"jpeg payload does not decode: {error.strerror}") from error


class _Local(threading.local):
    """A scaler for each thread: making one for each frame costs several times the conversion."""

    def __init__(self) -> None:
        self.scaler = VideoReformatter()


_LOCAL = _Local()


def _max_pixels(height: int, width: int) -> str:
    """What a decoder may allocate for a frame, so that a damaged header cannot ask for gigabytes.

    Decoders round sizes up to whole blocks and add borders.
    """
    return str((height + 128) * (width + 128))


def _collect(
    name: str,
    pictures: Iterator[VideoFrame],
    shape: tuple[int, int, int],
    coded: tuple[int, int],
    pixels: str,
    colours: Colorspace,
    levels: ColorRange,
) -> np.ndarray:
    """All pictures as read-only uint8 [*shape, 3], RGB, where shape is (frames, height, width).

    `coded` is the (height, width) that pictures must have, of which the rest is cut off. Raises DataError if they are
    not so many, not of that size, or not in the format `pixels`.
    """
    frames, height, width = shape
    clip: np.ndarray | None = None
    count = 0
    for picture in pictures:
        if (picture.height, picture.width, picture.format.name) != (*coded, pixels):
            raise DataError(
                f"{name} payload: frame {count} is {picture.height} x {picture.width} {picture.format.name}, "
                f"not {coded[0]} x {coded[1]} {pixels}"
            )
        if picture.is_corrupt:
            raise DataError(f"{name} payload: frame {count} is damaged")
        if count == frames:
            raise DataError(f"{name} payload decodes to more than {frames} frames")
        if clip is None:
            clip = np.empty((*shape, 3), dtype=np.uint8)
        rgb = _LOCAL.scaler.reformat(
            picture,
            format="rgb24",
            src_colorspace=colours,
            src_color_range=levels,
            dst_color_range=ColorRange.JPEG,
            interpolation=_SCALING,
            threads=1,
        )
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)[:height, : width * 3]
        clip[count] = rows.reshape(height, width, 3)
        count += 1
    if clip is None or count != frames:
        raise DataError(f"{name} payload decodes to {count} frames, not {frames}")
    clip.flags.writeable = False
    return clip
