"""What a session leaves behind: its film as a GIF, and its actions for `jobs/generate.py --mode replay`."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from flam_core.errors import SettingsError
from flam_core.steering.generate import frames_digest
from flam_core.steering.record import FilmRecord, Record
from flam_core.steering.scene import Feedback
from services.player.sessions import Session

_SIDE = 288
"""Pixels, about: the side of a scene in a GIF. Small frames are enlarged by whole factors."""
_GAP = 8
_MILLISECONDS = 150
_LAST_MILLISECONDS = 900


def gif(films: Sequence[Sequence[bytes]], since: int) -> bytes:
    """Films as PNG files, a row of them a frame, from step `since` on: an endless GIF.

    Raises SettingsError if the films are shorter.
    """
    if since >= len(films[0]):
        raise SettingsError(f"the film has {len(films[0])} frames, and begins at {since}", fix="Begin it earlier.")
    pages = []
    for row in zip(*(film[since:] for film in films), strict=True):
        frames = [Image.open(io.BytesIO(content)).convert("RGB") for content in row]
        scale = max(1, round(_SIDE / frames[0].width))
        width, height = frames[0].size
        # Colours are chosen for the small frame: that is quick, and enlarging by whole factors adds none.
        gap = -(-_GAP // scale)
        page = Image.new("RGB", (len(frames) * (width + gap) - gap, height), "white")
        for number, frame in enumerate(frames):
            page.paste(frame, (number * (width + gap), 0))
        page = page.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        pages.append(page.resize((page.width * scale, page.height * scale), Image.Resampling.NEAREST))
    durations = [_MILLISECONDS] * (len(pages) - 1) + [_LAST_MILLISECONDS]
    buffer = io.BytesIO()
    pages[0].save(buffer, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)
    return buffer.getvalue()


def record(session: Session, number: int, feedback: Feedback) -> str:
    """The actions of one side of a session as `jobs/generate.py` writes and replays them.

    Raises SettingsError for a side that there is not, or a scene in which nothing was done.
    """
    if not 0 <= number < len(session.sides):
        raise SettingsError(f"the scene has no side {number}", fix=f"It has {len(session.sides)}, counted from 0.")
    side = session.sides[number]
    if not side.taken:
        raise SettingsError("no step was taken, so there is nothing to replay", fix="Take one.")
    frames = torch.from_numpy(np.stack([_pixels(content) for content in side.film]))
    actions = torch.stack(side.taken)
    film = FilmRecord(
        label="played",
        known=[],
        actions=actions.tolist(),
        codes=side.served.actions.numbers(actions),
        frames_sha256=frames_digest(frames[1:]),
    )
    return Record(
        model=side.served.exact,
        weights_sha256=side.served.weights_sha256,
        mode="play",
        seed=session.seed,
        feedback=feedback,
        slot=side.slot,
        source={"clip": session.source},
        start_frames=1,
        start_sha256=frames_digest(frames[:1]),
        films=[film],
    ).to_json()


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
