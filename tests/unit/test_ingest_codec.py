"""The codec of an ingest: measured on what is read first, which a source gives but once, and named in the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data import ingest as ingest_module
from flam_core.data.codec_choice import CodecChoice, choose_codec
from flam_core.data.ingest import IngestOptions, ingest
from flam_core.data.shard import Clip, read_row_group
from flam_core.data.sources import Recording
from flam_core.data.videos import BadVideo
from flam_core.worlds.grid import GridWorld
from tests.stored_fixture import stored

FS = LocalFileSystem()
WORLD = GridWorld(agents=2, frame_size=32)


@dataclass(frozen=True)
class OneReel:
    """Noise and grid frames in turn, one recording after the other from one reel: none can be read out of turn."""

    lengths: tuple[int, ...]
    noisy: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    name: str = "reel"
    description: str = "a reel"
    licence: str = "MIT"
    episodes: None = None
    frames: None = None
    frame_size: tuple[int, int] = (32, 32)

    @property
    def settings(self) -> dict[str, Any]:
        return {"reel": repr((self.lengths, self.noisy, self.bad))}

    def episode(self, index: int) -> np.ndarray:
        if index in self.noisy:
            shape = (self.lengths[index], 32, 32, 3)
            return np.random.default_rng(index).integers(0, 256, size=shape, dtype=np.uint8)
        return next(WORLD.episodes(1, self.lengths[index], index)).frames

    def recordings(self, clip_frames: int) -> Iterator[Recording]:
        whole = True
        for index in range(len(self.lengths)):
            assert whole, "the recording before this one was not read to its end"
            whole = False

            def clips(index: int = index) -> Iterator[Clip | BadVideo]:
                nonlocal whole
                frames = self.episode(index)
                for start in range(0, len(frames), clip_frames):
                    yield Clip(f"reel-{index}", start, frames[start : start + clip_frames], 8.0)
                whole = True
                if index in self.bad:
                    yield BadVideo(f"reel-{index}", "torn")

            yield Recording(f"reel-{index}", clips())


@pytest.mark.parametrize("held", [1, 100_000, 300_000, 1 << 28])
def test_what_was_read_to_choose_a_codec_is_stored_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(ingest_module, "_HELD_BYTES", held)
    source = OneReel((50, 10, 33, 20, 64, 16, 40, 40, 40, 40, 70, 30), bad=(2, 10))
    report = ingest(source, FS, str(tmp_path), options=IngestOptions(clip_frames=16))
    expected = {
        f"reel-{index}:{start}": source.episode(index)[start : start + 16]
        for index, length in enumerate(source.lengths)
        if index not in source.bad
        for start in range(0, length - 15, 16)
    }
    found = stored(FS, str(tmp_path))
    assert set(found) == set(expected)
    assert all((found[clip][1] == expected[clip]).all() for clip in expected)
    assert {bad.path for bad in report.bad} == {"reel-1", "reel-2", "reel-10"}
    assert (report.manifest.codec, report.manifest.settings["codec"]) == ("zstd", "auto")
    assert report.codec_choice is not None
    assert report.codec_choice.codec == "zstd"
    # Held are one clip, three of the first recording, four recordings (one too short, one bad), or all that is wanted.
    assert report.codec_choice.clips == {1: 1, 100_000: 3, 300_000: 4, 1 << 28: 8}[held]
    again = ingest(source, FS, f"{tmp_path}/again", options=IngestOptions(clip_frames=16))
    assert again.manifest == report.manifest


def test_the_sample_takes_the_first_clip_of_each_recording_before_a_second_of_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def choose(sample: list[np.ndarray]) -> CodecChoice:
        seen.extend(sample)
        return choose_codec(sample)

    monkeypatch.setattr(ingest_module, "choose_codec", choose)
    source = OneReel((48, 32, 48))
    ingest(source, FS, f"{tmp_path}/a", options=IngestOptions(clip_frames=16))
    order = [(0, 0), (1, 0), (2, 0), (0, 16), (1, 16), (2, 16), (0, 32), (2, 32)]
    assert len(seen) == len(order)
    for frames, (episode, start) in zip(seen, order, strict=True):
        np.testing.assert_array_equal(frames, source.episode(episode)[start : start + 16])
    seen.clear()
    monkeypatch.setattr(ingest_module, "_SAMPLE_BYTES", 2 * 16 * 32 * 32 * 3)
    ingest(source, FS, f"{tmp_path}/b", options=IngestOptions(clip_frames=16))
    assert len(seen) == 2


@pytest.mark.parametrize("codec", ["zstd", "h264", "h264-444", "jpeg"])
def test_a_codec_that_is_named_is_taken_for_every_clip(tmp_path: Path, codec: Any) -> None:
    source = OneReel((40, 40, 40, 40), noisy=(0, 1))
    report = ingest(source, FS, str(tmp_path), options=IngestOptions(codec=codec))
    assert (report.manifest.codec, report.manifest.settings["codec"], report.codec_choice) == (codec, codec, None)
    rows = [
        row
        for shard in report.manifest.shards
        for row in read_row_group(FS, f"{tmp_path}/{shard.name}", 0, ["codec"]).to_pylist()
    ]
    assert rows == [{"codec": codec}] * 4
    found = stored(FS, str(tmp_path))
    quiet = {name: frames for name, (_, frames) in found.items() if int(name[5]) > 1}
    assert len(quiet) == 2
    for name, frames in quiet.items():
        error = np.abs(frames.astype(int) - source.episode(int(name[5])))
        assert error.mean() < (4 if codec == "h264" else 2)
        assert (error.max() == 0) == (codec == "zstd")


def test_the_first_recordings_decide_for_all(tmp_path: Path) -> None:
    """Which is why the table and the reason are shown: noise that comes later is stored as it was chosen."""
    source = OneReel((40,) * 12, noisy=(8, 9, 10, 11))
    report = ingest(source, FS, str(tmp_path))
    assert report.codec_choice is not None
    assert report.codec_choice.clips == 8
    assert report.manifest.codec == "zstd"
