"""How the frames of a clip become the bytes of a row. Each row names its codec, so codecs may be added.

zstd is lossless and decodes fast enough to sit beside the trainer; rendered video takes about as little as with H.264.
Camera video does not: `codec_choice` measures which one a source wants.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import zstandard

from flam_core.data.camera_codecs import H264_420, H264_444, Jpeg
from flam_core.errors import DataError

_ZSTD_LEVEL = 3  # higher levels cost time and win little on rendered frames; lower ones lose much above 256 pixels


class Codec(Protocol):
    """Turns one clip into bytes and back."""

    @property
    def name(self) -> str:
        """As stored in a row's `codec` column."""
        ...

    @property
    def heavy(self) -> bool:
        """True if decoding takes more than a core beside the trainer can give: it belongs on CPU nodes."""
        ...

    @property
    def lossless(self) -> bool:
        """True if `decode` gives exactly the frames that `encode` was given."""
        ...

    def encode(self, frames: np.ndarray) -> bytes:
        """The payload of a clip, uint8 [T, H, W, 3]. Equal clips give equal payloads."""
        ...

    def decode(self, payload: bytes | memoryview, frames: int, height: int, width: int) -> np.ndarray:
        """The clip, read-only uint8 [frames, height, width, 3]. Raises DataError if the payload is not that.

        Equal payloads give equal frames, on any machine and in any number of threads.
        """
        ...


class Zstd:
    """Lossless: one zstd frame over the whole clip, so that a still background costs next to nothing."""

    name = "zstd"
    heavy = False
    lossless = True

    def encode(self, frames: np.ndarray) -> bytes:
        """See `Codec.encode`."""
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(frames.tobytes())

    def decode(self, payload: bytes | memoryview, frames: int, height: int, width: int) -> np.ndarray:
        """See `Codec.decode`."""
        shape = (frames, height, width, 3)
        expected = frames * height * width * 3
        try:
            # The size is checked before a byte is unpacked: a damaged header must not ask for gigabytes.
            size = zstandard.frame_content_size(payload)
            if size != expected:
                raise DataError(f"zstd payload holds {size} bytes, a clip of {shape} has {expected}")
            pixels = _decompressor().decompress(payload)
        except zstandard.ZstdError as error:
            raise DataError(f"zstd payload does not decode: {error}") from error
        return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


_local = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """That of this thread: making one costs as much as a small clip, and threads cannot share it."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor


class Raw:
    """The pixels as they are. Not for data sets: it carries within a run what was decoded already."""

    name = "raw"
    heavy = False
    lossless = True

    def encode(self, frames: np.ndarray) -> bytes:
        """See `Codec.encode`."""
        return frames.tobytes()

    def decode(self, payload: bytes | memoryview, frames: int, height: int, width: int) -> np.ndarray:
        """See `Codec.decode`. A view of `payload`."""
        shape = (frames, height, width, 3)
        expected = frames * height * width * 3
        if len(payload) != expected:
            raise DataError(f"raw payload has {len(payload)} bytes, a clip of {shape} has {expected}")
        pixels = np.frombuffer(payload, dtype=np.uint8).reshape(shape)
        pixels.flags.writeable = False
        return pixels


_STORED: tuple[Codec, ...] = (Zstd(), H264_420, H264_444, Jpeg())
_CODECS = {codec.name: codec for codec in (*_STORED, Raw())}

STORED_CODECS = tuple(codec.name for codec in _STORED)
"""Names of the codecs that a data set may be stored with."""


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises DataError if there is none."""
    if name not in _CODECS:
        raise DataError(f"unknown codec {name!r}", fix=f"This flam has: {', '.join(sorted(_CODECS))}.")
    return _CODECS[name]
