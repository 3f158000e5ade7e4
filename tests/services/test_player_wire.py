"""Frames on the wire: they come as they went, and what is too large is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from flam_core.errors import DataError
from services.player import wire
from services.player.wire import frames_from_text, frames_to_text
from tests.services.player_fixture import SIZE
from tests.services.test_player_sessions import CLIPS


def test_frames_come_back_from_the_wire_as_they_went() -> None:
    frames = CLIPS[0].frames
    assert np.array_equal(frames_from_text(frames_to_text(frames), 7), frames)
    for sent, said in ((["?"], "not a PNG"), (frames_to_text(frames), "limit")):
        with pytest.raises(DataError, match=said):
            frames_from_text(sent, 3)
    with pytest.raises(DataError, match="differ in size"):
        frames_from_text([*frames_to_text(frames[:1]), *frames_to_text(frames[:1, ::2, ::2])], 3)


def test_a_png_of_two_sizes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    large = 40 * SIZE
    heads = [side.to_bytes(4) * 2 + b"\x08\x02\0\0\0" for side in (SIZE, large)]
    content = chunk(b"IDAT", zlib.compress(bytes((1 + 3 * large) * large))) + chunk(b"IEND", b"")
    file = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(b"IHDR", head) for head in heads) + content
    assert Image.open(io.BytesIO(file)).size == (large, large)  # Pillow goes by the last
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    for side in (SIZE, None):
        with pytest.raises(DataError, match="frame 0 is not a PNG"):
            frames_from_text([base64.b64encode(file).decode()], 1, side)


def test_frames_of_another_size_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = frames_to_text(np.zeros((3, 40, 64, 3), dtype=np.uint8))
    monkeypatch.setattr(wire, "_frame", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(DataError, match="64x40 pixels, and the model takes 24x24"):
        frames_from_text(sent, 3, SIZE)
    head = bytearray(base64.b64decode(frames_to_text(CLIPS[0].frames[:1])[0]))
    head[16:24] = (30_000).to_bytes(4) * 2
    for side, said in ((SIZE, "30000x30000 pixels, and"), (None, "30000x30000 pixels")):
        with pytest.raises(DataError, match=said):
            frames_from_text([base64.b64encode(head).decode()], 3, side)
