"""Verifying under faults: damage anywhere never crashes it, a storage that fails quarantines nothing; and the job."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flam_core.data.codec import Zstd
from flam_core.data.manifest import QUARANTINE_NAME, read_manifest
from flam_core.data.quarantine import BadClip, BadSource, Quarantine, read_quarantine, write_quarantine
from flam_core.data.shard import Clip, decode_clip, encode_clip, read_row_group
from flam_core.data.verify import verify_data
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from services.storage import resolve
from tests.verify_fixture import CHANGED, FS, make_grid, rows, spoil_clip, store, train, verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("verify") / "grid")


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "grid"))


@dataclass
class Disk:
    """The local disk, which lists what is read and raises `failure` once, when byte `at` of a shard is read."""

    failure: Exception | None = None
    at: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(FS, name)

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(_File(open(path, "rb"), self), mode="r")


class _File:
    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int) -> bytes:
        start, disk = self._file.tell(), self._disk
        disk.reads.append((start, size))
        if disk.failure is not None and start <= disk.at < start + size:
            failure, disk.failure = disk.failure, None
            raise failure
        return self._file.read(size)


def test_each_byte_is_read_once_and_little_is_held(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, size=(32, 256, 256, 3), dtype=np.uint8) for _ in range(5)]  # 6.3 MB each
    batches = [encode_clip(Clip(f"episode {i}", 0, frames, 5.0), Zstd()) for i, frames in enumerate(noise)]
    manifest = store(tmp_path, batches, batches[0], frame_size=(256, 256), has_truth=False)
    disk = Disk()
    assert verify_data(disk, str(tmp_path), workers=1).quarantine == Quarantine()
    total = sum(size for _, size in disk.reads)
    assert total <= manifest.total_bytes + 3 * 65536  # Parquet asks for the footer first
    assert max(size for _, size in disk.reads) <= 16 << 20


def test_a_storage_that_fails_quarantines_nothing(whole: Path) -> None:
    for at in range(0, train(whole).bytes, 997):
        with pytest.raises(
            EnvironmentFault, match=r"cannot read shard .*the disk is on fire.* nothing was quarantined"
        ):
            verify_data(Disk(OSError("the disk is on fire"), at), str(whole), workers=1)


def test_memory_that_runs_out_is_no_damage(whole: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"does not fit in memory: malloc of size 3 failed\. .*fewer workers"):
        verify_data(Disk(MemoryError("malloc of size 3 failed"), 20_000), str(whole), workers=1)


def test_a_shard_that_may_not_be_opened(data: Path) -> None:
    shard = train(data)
    (data / shard.name).unlink()
    (data / shard.name).mkdir()
    with pytest.raises(EnvironmentFault, match=f"cannot read shard .*{shard.name}"):
        verify(data)


def test_what_cannot_be_verified(data: Path) -> None:
    with pytest.raises(SettingsError, match="workers = 0"):
        verify_data(FS, str(data), workers=0)
    with pytest.raises(DataError, match="no data set"):
        verify_data(FS, f"{data}/none")


def test_the_caller_can_stop_it(whole: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_data(FS, str(whole), workers=2, on_progress=stop)


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@settings(max_examples=150)
@given(flips, st.booleans())
def test_flipped_bits_are_quarantined_and_what_stays_is_right(
    whole: Path, changes: list[tuple[float, int]], footer: bool
) -> None:
    """`footer` moves the damage to the end of the file, which is small but has much to get wrong."""
    shard = train(whole)
    content = (whole / shard.name).read_bytes()
    damaged = bytearray(content)
    first = len(content) * 5 // 6 if footer else 0
    for place, flip in changes:
        damaged[first + int(place * (len(content) - first))] ^= flip
    if damaged == content:
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(shutil.copytree(whole, f"{folder}/grid"))
        (data / shard.name).write_bytes(damaged)
        quarantine = verify(data)
        assert {bad.shard for bad in quarantine.clips} == {shard.name}
        assert Quarantine.from_json(quarantine.to_json()) == quarantine
        left_out = quarantine.rows(shard)
        row = 0
        for group, clips in enumerate(shard.row_groups):
            if not left_out.issuperset(range(row, row + clips)):  # as a plan does, which reads row groups
                good = read_row_group(FS, f"{whole}/{shard.name}", group).to_pylist()
                found = read_row_group(FS, f"{data}/{shard.name}", group).to_pylist()
                for i in set(range(clips)) - {out - row for out in left_out}:
                    pixels = decode_clip(found[i], shard.name)
                    np.testing.assert_array_equal(pixels, decode_clip(good[i], shard.name))
            row += clips


def test_a_bucket(whole: Path, s3_server: Callable[[], str]) -> None:
    place = resolve(f"s3://{s3_server()}/sets/grid")
    shard, names = train(whole), [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]

    def put(name: str, content: bytes) -> None:
        with place.fs.open_output_stream(f"{place.path}/{name}") as stream:
            stream.write(content)

    for name in names:
        put(name, (whole / name).read_bytes())
    assert verify_data(place.fs, place.path).quarantine == Quarantine()
    damaged = bytearray((whole / shard.name).read_bytes())
    damaged[damaged.index(rows(whole, shard)[5]["payload"]) + 20] ^= 1
    put(shard.name, bytes(damaged))
    missing = read_manifest(place.fs, place.path).split("val")[0]
    place.fs.delete_file(f"{place.path}/{missing.name}")
    write_quarantine(place.fs, place.path, verify_data(place.fs, place.path).quarantine)
    first, second = read_quarantine(place.fs, place.path).clips
    assert (first.shard, first.row) == (shard.name, 5)
    assert second == BadClip(missing.name, None, None, "is missing")


def job(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "ingest.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_job_says_what_is_broken_and_ends_with_4_if_it_is_too_much(data: Path) -> None:
    shard = train(data)
    spoil_clip(data, shard, 5)
    line = f"{shard.name}, row 5 ({rows(data, shard)[5]['id']}): the payload is damaged (crc32 differs); {CHANGED}"
    done = job("--verify", str(data))
    assert done.returncode == 4, done.stderr
    assert f"bad: {line}\n" in done.stdout
    assert done.stderr.startswith(f"flam: error: 1 of 32 clips bad (3.12%), at most 1.00% may be: {line}. ")
    assert done.stderr.count("\n") == 1
    found = read_quarantine(FS, str(data))
    assert found.rows(shard) == {5}

    (data / QUARANTINE_NAME).unlink()
    done = job("--verify", "--out", str(data), "--max_bad_share", "0.05")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bad: {line}\n" in done.stdout
    for name, value in {"clips": "32", "bad": "1", "share": "3.12%"}.items():
        assert [name, value] in [row.replace("│", " ").split() for row in done.stdout.splitlines()]
    assert read_quarantine(FS, str(data)) == found


def test_the_job_on_whole_data_and_on_none(whole: Path, data: Path) -> None:
    (data / QUARANTINE_NAME).write_text('[{"path": "a.mp4", "reason": "no frames"}]')
    done = job("--out", str(data), "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "bad:" not in done.stdout
    assert read_quarantine(FS, str(data)) == Quarantine((BadSource("a.mp4", "no frames"),))
    done = job("--verify", str(data / "none"))
    assert done.returncode == 4
    assert done.stderr.startswith("flam: error: no data set at ")
