"""Which codec a source wants, by measuring: each is tried on a few clips, and a fixed rule reads the table.

Rendered video wants lossless zstd, camera video H.264 with half-resolution chroma. That chroma ruins pixel art (27 to
33 dB, more than a world model's whole error), so it is taken only where it is measured to cost next to nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flam_core.data.camera_codecs import H264, H264_420, H264_444
from flam_core.data.codec import STORED_CODECS, Codec, Zstd, get_codec
from flam_core.errors import DataError

_SMALL_PIXELS = 128
_SMALL_SHARE = 0.35  # of raw, that zstd may take up to that frame size: 20 times faster to decode is worth the bytes
_ANY_SHARE = 0.05  # and at any size
_CHROMA_LOSS_DB = 1.0
_LEAST_PSNR_DB = 38.0

_FULL_CHROMA = H264("full chroma", "yuv444p", H264_420.crf)  # measured only, to tell what half chroma costs


@dataclass(frozen=True)
class CodecMeasure:
    """What a codec did with the sample."""

    codec: str
    bytes_per_frame: float
    share_of_raw: float
    """Bytes over those of the pixels."""
    frames_per_second: float
    """Decoded on one core of this machine. It informs, but does not decide."""
    psnr_db: float
    """Over all pixels and channels of the sample, after coding; infinite if nothing changed."""


@dataclass(frozen=True)
class CodecChoice:
    """The codec chosen for a source, and why."""

    codec: str
    reason: str
    """One sentence."""
    measured: tuple[CodecMeasure, ...]
    """Of every codec that a data set may be stored with."""
    clips: int
    """In the sample."""
    frames: int
    """In the sample."""


def choose_codec(sample: Sequence[np.ndarray]) -> CodecChoice:
    """Try every codec on the clips of `sample`, each uint8 [T, H, W, 3], and choose one.

    zstd, if it takes at most 35 % of raw up to 128 pixels, or 5 % at any size. Else H.264 with half-resolution chroma,
    if full chroma at the same quality setting is at most 1 dB better. Else H.264 with full chroma, if it keeps 38 dB.
    And none but zstd unless it is smaller than zstd. Equal samples give equal choices, on any machine.

    Raises DataError if the sample is empty.
    """
    if not sample:
        raise DataError("no clips to choose a codec by", fix="Name a codec.")
    measured = {name: _measure(get_codec(name), sample) for name in STORED_CODECS}
    codec, reason = _decide(measured, sample)
    return CodecChoice(codec, reason, tuple(measured.values()), len(sample), sum(len(clip) for clip in sample))


def _decide(measured: dict[str, CodecMeasure], sample: Sequence[np.ndarray]) -> tuple[str, str]:
    """The codec and the reason for it."""
    zstd, half, full = (measured[name] for name in (Zstd.name, H264_420.name, H264_444.name))
    pixels = max(max(clip.shape[1:3]) for clip in sample)
    most = _SMALL_SHARE if pixels <= _SMALL_PIXELS else _ANY_SHARE
    lossless = f"lossless {zstd.codec} takes {zstd.share_of_raw:.1%} of raw"
    if zstd.share_of_raw <= most:
        return zstd.codec, f"{lossless}, and up to {most:.0%} it is best at {pixels} pixels."
    loss = _chroma_loss(sample, half.psnr_db)
    if loss <= _CHROMA_LOSS_DB and half.bytes_per_frame < zstd.bytes_per_frame:
        return half.codec, (
            f"{lossless} (more than {most:.0%}), and half-resolution chroma costs {max(0.0, loss):.1f} dB here "
            f"(at most {_CHROMA_LOSS_DB:.0f} dB)."
        )
    if full.psnr_db >= _LEAST_PSNR_DB and full.bytes_per_frame < zstd.bytes_per_frame:
        return full.codec, (
            f"{lossless} (more than {most:.0%}), half-resolution chroma would cost {loss:.1f} dB, and full chroma "
            f"keeps {full.psnr_db:.1f} dB (at least {_LEAST_PSNR_DB:.0f} dB)."
        )
    return zstd.codec, (
        f"{lossless}, but half-resolution chroma would cost {loss:.1f} dB and full chroma keeps {full.psnr_db:.1f} dB "
        f"at {full.share_of_raw:.1%} of raw."
    )


def _chroma_loss(sample: Sequence[np.ndarray], half_db: float) -> float:
    """dB that are lost with half-resolution chroma at the same quality setting; negative if none are."""
    if math.isinf(half_db):
        return 0.0
    return _measure(_FULL_CHROMA, sample).psnr_db - half_db


def _measure(codec: Codec, sample: Sequence[np.ndarray]) -> CodecMeasure:
    size = squares = 0
    seconds = 0.0
    for clip in sample:
        payload = codec.encode(clip)
        size += len(payload)
        started = time.perf_counter()
        decoded = codec.decode(payload, *clip.shape[:3])
        seconds += time.perf_counter() - started
        squares += _squares(clip, decoded)
    raw = sum(clip.size for clip in sample)
    frames = sum(len(clip) for clip in sample)
    psnr = 10.0 * math.log10(255.0**2 * raw / squares) if squares else math.inf
    return CodecMeasure(codec.name, size / frames, size / raw, frames / seconds, psnr)


def _squares(a: np.ndarray, b: np.ndarray) -> int:
    """Sum of squared differences: in integers, so that no machine rounds it otherwise."""
    total = 0
    for left, right in zip(a, b, strict=True):
        difference = left.astype(np.int64) - right
        total += int(np.vdot(difference, difference))
    return total
