"""Films as files: an MP4 and a GIF that people can see, and a strip of frames with the slots' masks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.frame import VideoFrame
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

from flam_core.evaluation.pictures import (
    PANEL,
    name_columns,
    paint_masks,
    png,
    sheet,
    shown_columns,
    slot_colours,
    strip,
)

_ACROSS = 4
"""Panels side by side at most."""
_PAD, _HEAD = 10, 26


@dataclass(frozen=True, eq=False)
class Panel:
    """A film uint8 [T, H, W, 3] and what it is called, in one or more short lines."""

    label: str
    frames: np.ndarray


def masks_panel(label: str, frames: np.ndarray, masks: np.ndarray, marked: int | None = None) -> Panel:
    """Frames in the colours of the slots that claim them (masks float32 [T, K, P]); a marked slot alone in its own."""
    return Panel(label, paint_masks(frames, masks, marked))


def film_mp4(panels: Sequence[Panel], context: int, fps: float) -> bytes:
    """The panels side by side as H.264, `fps` steps a second; each panel is enlarged by a whole factor."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"  # what every player takes; pixels are enlarged, so no colour is lost
        stream.options = {"crf": "12", "preset": "veryfast", "movflags": "faststart"}
        for number, page in enumerate(_pages(panels, context)):
            if not number:
                stream.width, stream.height = page.width, page.height
            container.mux(stream.encode(VideoFrame.from_image(page)))
        container.mux(stream.encode())
    return buffer.getvalue()


def film_gif(panels: Sequence[Panel], context: int, fps: float) -> bytes:
    """The same as an endless GIF."""
    # GIF has 256 colours: by default rare ones, such as a small entity's, are lost to many shades of another.
    pages = (
        page.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
        for page in _pages(panels, context)
    )
    first, frames = next(pages), len(panels[0].frames)
    usual = round(1000 / fps)
    durations = [max(usual, 900) if t < context or t == frames - 1 else usual for t in range(frames)]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=pages, duration=durations, loop=0)
    return buffer.getvalue()


def film_strip(panels: Sequence[Panel], context: int, slots: int = 0, marked: int | None = None) -> bytes:
    """A PNG of the panels below one another, time to the right; with `slots`, their colours below."""
    frames = panels[0].frames
    columns = shown_columns(len(frames))
    pitch = frames.shape[1] / frames.shape[2] + 0.08
    figure = sheet(columns, 0.35 + len(panels) * pitch + (0.4 if slots else 0.1))
    for row, panel in enumerate(panels):
        axis = strip(figure, 0.35 + row * pitch, panel.label, panel.frames[columns])
        if row == 0:
            name_columns(axis, columns, context, frames.shape[2])
    if slots:
        handles = [
            Patch(color=colour, label=f"slot {k}{' (edited)' if k == marked else ''}")
            for k, colour in enumerate(slot_colours(slots))
        ]
        figure.legend(handles=handles, loc="lower center", ncols=min(8, slots), fontsize=9, frameon=False)
    return png(figure)


def _pages(panels: Sequence[Panel], context: int) -> Iterator[Image.Image]:
    """A page for each frame, of an even size."""
    total, height, width = panels[0].frames.shape[:3]
    scale = max(1, -(-PANEL // width))
    across = min(_ACROSS, len(panels))
    lines = max(panel.label.count("\n") for panel in panels) + 1
    head = 18 * lines + 8
    cell_x, cell_y = width * scale + _PAD, height * scale + head
    size = (across * cell_x + _PAD, _HEAD + -(-len(panels) // across) * cell_y + _PAD)
    even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
    font = ImageFont.load_default(15)
    for t in range(total):
        page = Image.new("RGB", even, "white")
        draw = ImageDraw.Draw(page)
        moment = f"step {t - context + 1} of {total - context}" if t >= context else "given"
        draw.text((_PAD, 6), moment, fill="black", font=font)
        for number, panel in enumerate(panels):
            row, column = divmod(number, across)
            corner = (_PAD + column * cell_x, _HEAD + row * cell_y)
            draw.multiline_text((corner[0], corner[1] + 2), panel.label, fill="black", font=font, spacing=2)
            picture = Image.fromarray(panel.frames[t]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            page.paste(picture, (corner[0], corner[1] + head))
        yield page
