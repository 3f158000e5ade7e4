"""Clips to steer from: a video file or a picture of any size, brought to the size that a model takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flam_core.data.images import IMAGE_SUFFIXES, decode_image
from flam_core.data.videos import SUFFIXES, Unusable, VideoChunk, VideoOptions, cut_frames, cut_video
from flam_core.errors import DataError


def read_clip(path: Path, size: int, frames: int, fps: float | None = None) -> Tensor:
    """The first frames of a video file, at most `frames`, or a picture as one: uint8 [t, size, size, 3].

    The longer side is cut and the rest scaled, as `jobs/ingest.py` does. fps: frames a second; None takes all there
    are. Raises DataError for a file that cannot be read.
    """
    options = VideoOptions(size=size, fps=fps)
    if not path.is_file():
        raise DataError(f"{path} is not a file", fix="Give a video or a picture.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES | IMAGE_SUFFIXES:
        known = ", ".join(sorted(SUFFIXES | IMAGE_SUFFIXES))
        raise DataError(f"{path} is neither a video nor a picture that flam reads", fix=f"Known: {known}.")
    try:
        chunks = _picture(path, options) if suffix in IMAGE_SUFFIXES else cut_video(path, options, 1)
        # What comes after is not looked at: a film that breaks off later has the frames that are wanted.
        found = [chunk.frames for chunk in islice(chunks, frames)]
    except Unusable as error:
        raise DataError(f"{path} cannot be used: {error}", fix="Is the file whole, and is it a video?") from error
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(found)))


def _picture(path: Path, options: VideoOptions) -> Iterator[VideoChunk]:
    return cut_frames([decode_image(path.read_bytes(), path.name)], options.fps or 1.0, options, 1)
