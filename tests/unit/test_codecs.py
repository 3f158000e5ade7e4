"""Codecs: what comes back, that it is always the same, and that damage is an error; and the choice between them."""

from __future__ import annotations

import io
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from functools import cache
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flam_core.data.codec import STORED_CODECS, Raw, get_codec
from flam_core.data.codec_choice import CodecChoice, CodecMeasure, choose_codec
from flam_core.errors import DataError
from flam_core.worlds.grid import GridWorld

CODECS = (*STORED_CODECS, "raw")
CAMERA_CODECS = ("h264", "h264-444", "jpeg")


def camera(frames: int, height: int, width: int, *, noise: float = 4.0, seed: int = 0) -> np.ndarray:
    """Smooth moving colours under the noise of a sensor, most of it in brightness."""
    rng = np.random.default_rng(seed)
    waves = rng.uniform((0.01, 0.01, 0.0), (0.08, 0.08, 6.28), size=(6, 3))
    phases = rng.uniform(0, 6.28, size=(6, 3))
    rows, columns = np.mgrid[:height, :width]
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for t in range(frames):
        picture = np.full((height, width, 3), 120.0)
        for (down, right, _), phase in zip(waves, phases, strict=True):
            picture += 18 * np.sin((down * (rows + 1.5 * t) + right * (columns - 2 * t))[..., None] + phase)
        picture += rng.normal(0, noise, (height, width, 1)) + rng.normal(0, noise / 4, (height, width, 3))
        clip[t] = picture.clip(0, 255)
    return clip


def pixel_art(frames: int, size: int, *, noise: float, seed: int = 0) -> np.ndarray:
    """Blocks of pure colours that move in steps, under noise that lossless coding cannot take."""
    rng = np.random.default_rng(seed)
    colours = np.array([(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)])
    blocks = rng.integers(len(colours), size=(size // 8, size // 8))
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for t in range(frames):
        picture = colours[np.roll(blocks, t // 4, axis=1)].repeat(8, axis=0).repeat(8, axis=1)
        clip[t] = (picture + rng.normal(0, noise, picture.shape)).clip(0, 255)
    return clip


def grid(size: int = 48, episodes: int = 4) -> list[np.ndarray]:
    return [episode.frames for episode in GridWorld(agents=3, cells=6, frame_size=size).episodes(episodes, 64, 0)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def round_trip(name: str, clip: np.ndarray) -> np.ndarray:
    codec = get_codec(name)
    return codec.decode(codec.encode(clip), *clip.shape[:3])


@pytest.mark.parametrize(
    ("name", "heavy", "lossless"),
    [
        ("zstd", False, True),
        ("h264", True, False),
        ("h264-444", True, False),
        ("jpeg", True, False),
        ("raw", False, True),
    ],
)
def test_what_a_codec_says_of_itself(name: str, heavy: bool, lossless: bool) -> None:
    codec = get_codec(name)
    assert (codec.name, codec.heavy, codec.lossless) == (name, heavy, lossless)
    clip = camera(20, 32, 48)
    assert (round_trip(name, clip) == clip).all() == lossless
    assert (name in STORED_CODECS) == (name != "raw")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 8), (17, 63, 65), (2, 17, 32), (20, 32, 31), (40, 96, 96)])
def test_a_clip_of_any_size_comes_back(name: str, shape: tuple[int, int, int]) -> None:
    clip = camera(*shape, noise=1.0)
    payload = get_codec(name).encode(clip)
    decoded = get_codec(name).decode(payload, *shape)
    assert (decoded.shape, decoded.dtype, decoded.flags.writeable) == (clip.shape, np.uint8, False)
    assert decoded.flags.c_contiguous
    assert psnr(decoded, clip) > 36
    np.testing.assert_array_equal(get_codec(name).decode(memoryview(payload), *shape), decoded)


@pytest.mark.parametrize("name", CODECS)
def test_frames_keep_their_order(name: str) -> None:
    """Each frame is of its own brightness, and a GOP ends within the clip."""
    clip = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8)[:, None, None, None], (40, 16, 16, 3))
    levels = round_trip(name, clip).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, np.arange(0, 240, 6), atol=2)


@pytest.mark.parametrize("name", CODECS)
def test_equal_clips_give_equal_payloads_and_views_are_clips(name: str) -> None:
    clip = camera(40, 40, 40)[::2, ::-1, :33]
    assert not clip.flags.c_contiguous
    payloads = {get_codec(name).encode(clip), get_codec(name).encode(clip.copy())}
    assert len(payloads) == 1


@pytest.mark.parametrize("name", CODECS)
def test_every_decode_gives_the_same_bytes_in_any_thread(name: str) -> None:
    """Clips of several sizes at once, so that what a thread keeps between clips would show."""
    clips = [camera(18, 24 + 8 * i, 40, seed=i) for i in range(3)]
    jobs = [(get_codec(name).encode(clip), clip.shape[:3]) for clip in clips] * 8
    expected = [get_codec(name).decode(payload, *shape) for payload, shape in jobs[:3]] * 8
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: get_codec(name).decode(job[0], *job[1]), jobs))
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CAMERA_CODECS)
@pytest.mark.parametrize("axis", [1, 2])
def test_colour_ramps_come_back_without_a_shift(name: str, axis: int) -> None:
    """A shift of half a pixel, of range (16-235 for 0-255) or of primaries (BT.601 for 709) would show here."""
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    clip = np.full((18, 96, 96, 3), 128, dtype=np.uint8)
    clip[..., 0] = ramp[:, None] if axis == 1 else ramp
    clip[..., 1] = ramp[::-1, None] if axis == 1 else ramp[::-1]
    decoded = round_trip(name, clip)
    assert psnr(decoded, clip) > 42
    inner = decoded[:, 8:-8, 8:-8].astype(float) - clip[:, 8:-8, 8:-8]
    assert np.abs(inner.mean(axis=(0, 1, 2))).max() < 0.6


@pytest.mark.parametrize("name", ["h264-444", "jpeg"])
def test_flat_patches_keep_their_colour(name: str) -> None:
    clip = np.zeros((18, 48, 64, 3), dtype=np.uint8)
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]):
        clip[:, :, 16 * index : 16 * (index + 1)] = colour
    assert np.abs(round_trip(name, clip).astype(int) - clip).max() <= 3


@pytest.mark.parametrize(("name", "pixels"), [("h264", "yuv420p"), ("h264-444", "yuv444p")])
def test_a_payload_is_an_mp4_that_says_how_to_show_it(name: str, pixels: str) -> None:
    payload = get_codec(name).encode(camera(40, 48, 64))
    with av.open(io.BytesIO(payload)) as container:
        (stream,) = container.streams.video
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", pixels, False)
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
        assert (context.color_primaries, context.color_trc) == (1, 1)
        keys = [i for i, packet in enumerate(p for p in container.demux(stream) if p.size) if packet.is_keyframe]
    assert keys == [0, 16, 32]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(19, 32, 48), (21, 32, 48), (20, 64, 48), (20, 32, 46), (0, 32, 48)])
def test_another_clip_than_expected_is_refused(name: str, shape: tuple[int, int, int]) -> None:
    payload = get_codec(name).encode(camera(20, 32, 48))
    with pytest.raises(DataError, match=f"{name} payload"):
        get_codec(name).decode(payload, *shape)


@pytest.mark.parametrize("name", CAMERA_CODECS)
def test_height_for_width_is_refused(name: str) -> None:
    payload = get_codec(name).encode(camera(20, 32, 48))
    with pytest.raises(DataError, match=r"(20 frames of )?32 x 48.*, not (20 of )?48 x 32"):
        get_codec(name).decode(payload, 20, 48, 32)


def test_other_video_in_an_mp4_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"no MP4 with one H\.264 stream"):
        get_codec("h264").decode(file.getvalue(), 4, 32, 32)


def test_a_jpeg_header_that_lies_is_refused() -> None:
    jpeg = get_codec("jpeg")
    payload = jpeg.encode(camera(2, 16, 16))
    first, second = struct.unpack("<2I", payload[4:12])
    for lengths in ((first + 1, second), (first - 1, second + 1), (0, first + second), (2**32 - 1, second)):
        with pytest.raises(DataError, match="jpeg payload"):
            jpeg.decode(payload[:4] + struct.pack("<2I", *lengths) + payload[12:], 2, 16, 16)
    with pytest.raises(DataError, match="announces 4294967295 frames"):
        jpeg.decode(b"\xff" * 4 + payload[4:], 2, 16, 16)


def test_raw_is_a_view() -> None:
    payload = bytearray(range(48))
    clip = Raw().decode(memoryview(payload), 1, 4, 4)
    payload[5] = 99
    assert clip[0, 0, 1, 2] == 99
    with pytest.raises(DataError, match="raw payload has 48 bytes"):
        Raw().decode(bytes(payload), 2, 4, 4)


@cache
def whole(name: str) -> bytes:
    return get_codec(name).encode(camera(20, 24, 32))


@given(st.sampled_from(CODECS), st.data())
@settings(max_examples=600, deadline=timedelta(seconds=30))
def test_damage_is_a_data_error_or_goes_unseen(name: str, data: st.DataObject) -> None:
    """But never a crash, a hang, another error or a clip of another shape."""
    payload = bytearray(whole(name))
    near_index = payload.rfind(b"moov") if data.draw(st.booleans()) else 0  # H.264: most kinds of damage are there
    for place in data.draw(st.lists(st.integers(max(0, near_index), len(payload) - 1), max_size=8)):
        payload[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.none() | st.integers(0, len(payload)))
    found: np.ndarray | str
    try:
        found = get_codec(name).decode(bytes(payload[:cut]), 20, 24, 32)
    except DataError as error:
        found = str(error)
    if isinstance(found, str):
        assert "payload" in found
        assert "\n" not in found
    else:
        assert (found.shape, found.dtype) == ((20, 24, 32, 3), np.uint8)


@given(st.sampled_from(CODECS), st.binary(max_size=200), st.integers(0, 2**31), st.integers(1, 2**15))
@settings(max_examples=200)
def test_garbage_is_a_data_error_whatever_the_row_says(name: str, payload: bytes, frames: int, side: int) -> None:
    if name == "raw" and len(payload) == frames * side * side * 3:
        return
    with pytest.raises(DataError):
        get_codec(name).decode(payload, frames, side, side)


# The choice


def measures(choice: CodecChoice) -> dict[str, CodecMeasure]:
    return {one.codec: one for one in choice.measured}


def test_a_grid_world_is_stored_losslessly() -> None:
    sample = grid()
    choice = choose_codec(sample)
    assert choice.codec == "zstd"
    assert choice.reason.startswith("lossless zstd takes ")
    assert choice.reason.endswith(" of raw, and up to 35% it is best at 48 pixels.")
    assert (choice.clips, choice.frames) == (4, 256)
    table = measures(choice)
    assert tuple(table) == STORED_CODECS
    assert table["zstd"].psnr_db == math.inf
    assert table["zstd"].bytes_per_frame == sum(len(get_codec("zstd").encode(clip)) for clip in sample) / 256
    assert table["zstd"].share_of_raw == table["zstd"].bytes_per_frame / (48 * 48 * 3)
    assert table["h264"].psnr_db == pytest.approx(
        psnr(np.stack(sample), np.stack([round_trip("h264", clip) for clip in sample])), abs=1e-6
    )
    assert table["h264"].psnr_db < 36 < table["h264-444"].psnr_db
    assert all(one.frames_per_second > 0 for one in choice.measured)


def test_camera_video_is_stored_as_h264() -> None:
    choice = choose_codec([camera(20, 192, 192, seed=seed) for seed in range(2)])
    assert choice.codec == "h264"
    assert "half-resolution chroma costs 0.0 dB here" in choice.reason
    table = measures(choice)
    assert table["zstd"].share_of_raw > 0.6
    assert table["h264"].share_of_raw < 0.1


@pytest.mark.parametrize(("noise", "codec"), [(4.0, "h264-444"), (20.0, "zstd")])
def test_noisy_pixel_art_never_loses_its_chroma(noise: float, codec: str) -> None:
    choice = choose_codec([pixel_art(20, 160, noise=noise)])
    assert choice.codec == codec
    assert "half-resolution chroma would cost" in choice.reason
    table = measures(choice)
    assert table["zstd"].share_of_raw > 0.05
    assert table["h264"].psnr_db < 25
    assert (table["h264-444"].psnr_db >= 38) == (codec == "h264-444")


def test_zstd_may_take_more_of_small_frames_than_of_large_ones() -> None:
    """Between 5 and 35 % of raw, the size decides."""
    small, large = (np.tile(camera(1, size, size), (8, 1, 1, 1)) for size in (128, 160))
    for clip, codec in ((small, "zstd"), (large, "h264")):
        choice = choose_codec([clip])
        assert 0.05 < measures(choice)["zstd"].share_of_raw < 0.35
        assert choice.codec == codec


def test_equal_samples_give_equal_choices_but_for_the_speed() -> None:
    def fixed(choice: CodecChoice) -> tuple[Any, ...]:
        table = [(one.codec, one.bytes_per_frame, one.psnr_db) for one in choice.measured]
        return choice.codec, choice.reason, table

    sample = [camera(20, 136, 136)]
    assert fixed(choose_codec(sample)) == fixed(choose_codec(sample))


def test_black_frames_are_no_division_by_zero() -> None:
    choice = choose_codec([np.zeros((16, 32, 32, 3), dtype=np.uint8)])
    assert choice.codec == "zstd"
    assert measures(choice)["jpeg"].psnr_db == math.inf


def test_no_sample_is_refused() -> None:
    with pytest.raises(DataError, match="no clips to choose a codec by"):
        choose_codec([])
