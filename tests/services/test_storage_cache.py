"""The cache of blocks: one folder, several processes, a full disk, a kill, damage."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flam_core.errors import SettingsError
from services.storage import BlockCache, counters, shared_cache

pytestmark = pytest.mark.timeout(120)

ROWS = 1000
SPAWN = multiprocessing.get_context("spawn")


@lru_cache
def block(key: str) -> pa.Table:
    """A table that belongs to `key`, of about 100 kB."""
    rng = np.random.default_rng(list(key.encode()))
    payload = pa.array([rng.bytes(90) for _ in range(ROWS)], pa.large_binary())
    return pa.table({"id": pa.array([key] * ROWS), "payload": payload})


BLOCK_BYTES = 110_000


def never() -> pa.Table:
    raise AssertionError("fetched, though it is in the cache")


def fetching(key: str) -> Callable[[], pa.Table]:
    return lambda: block(key)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.block"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_a_block_is_fetched_once_and_mapped(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    before, allocated = counters.snapshot(), 0
    assert cache.get_or_fetch("a", fetching("a")).equals(block("a"))
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301
    allocated = pa.total_allocated_bytes()
    table = again.get_or_fetch("a", never)
    assert pa.total_allocated_bytes() - allocated < BLOCK_BYTES / 10
    assert table.equals(block("a"))
    counted = counters.difference(counters.snapshot(), before)
    assert (counted["cache_hits"], counted["cache_misses"]) == (1, 1)


def test_a_process_shares_one_cache(tmp_path: Path) -> None:
    cache = shared_cache(tmp_path, 1 << 20)
    cache.get_or_fetch("a", fetching("a"))
    assert shared_cache(tmp_path, 1 << 20) is cache
    assert shared_cache(tmp_path, 2 << 20).get_or_fetch("a", never).equals(block("a"))


def test_what_fetch_raises_is_raised_and_nothing_is_kept(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_fetch("a", lambda: pa.table({"x": [1 // 0]}))
    assert not files(tmp_path)


def test_the_one_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 3 * BLOCK_BYTES)
    for key in "abc":
        cache.get_or_fetch(key, fetching(key))
        time.sleep(0.01)
    held = cache.get_or_fetch("a", never)
    cache.get_or_fetch("d", fetching("d"))
    assert size(tmp_path) <= 3 * BLOCK_BYTES
    for key in "acd":
        cache.get_or_fetch(key, never)
    for key in "efg":
        cache.get_or_fetch(key, fetching(key))
    assert len(files(tmp_path)) == 3
    assert held.equals(block("a"))  # deleted, but mapped
    with pytest.raises(AssertionError, match="fetched"):
        cache.get_or_fetch("a", never)


def test_a_block_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, BLOCK_BYTES // 2)
    assert cache.get_or_fetch("a", fetching("a")).equals(block("a"))
    assert not files(tmp_path)


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "longer", "trailer"])
def test_a_damaged_block_is_fetched_again(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    cache.get_or_fetch("a", fetching("a"))
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1 if damage == "trailer" else len(content) // 2] ^= 1
    broken = {"cut": content[:-100], "empty": b"", "longer": bytes(content) + b"x"}.get(damage, bytes(content))
    path.write_bytes(broken)
    before = counters.snapshot()
    assert cache.get_or_fetch("a", fetching("a")).equals(block("a"))
    assert counters.difference(counters.snapshot(), before)["cache_corrupt"] == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert str(path) in line
    assert "is damaged" in line
    assert cache.get_or_fetch("a", never).equals(block("a"))
    assert capfd.readouterr().err == ""


def _use_full_disk(folder: Path, said: multiprocessing.SimpleQueue[str]) -> None:
    import resource  # of this process alone: a limit on the size of files stands for a disk that is full

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache = BlockCache(folder, 1 << 30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES // 2, resource.RLIM_INFINITY))
    for key in "abc":
        assert cache.get_or_fetch(key, fetching(key)).equals(block(key))
    said.put(",".join(path.name for path in folder.glob("*/*")))


def test_a_disk_that_takes_no_more_is_no_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=_use_full_disk, args=(tmp_path, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert said.get() == ""
    (line,) = capfd.readouterr().err.splitlines()
    assert "stores no more blocks" in line
    assert os.strerror(errno.EFBIG) in line


def test_a_folder_that_cannot_be_is_no_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    cache = BlockCache(tmp_path / "file" / "cache", 1 << 20)
    for _ in range(2):
        assert cache.get_or_fetch("a", fetching("a")).equals(block("a"))
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_cache_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cache of 0 bytes"):
        BlockCache(tmp_path, 0)


def _hammer(folder: Path, seed: int, rounds: int) -> None:
    cache, rng = BlockCache(folder, 5 * BLOCK_BYTES), random.Random(seed)
    held = []
    for _ in range(rounds):
        key = f"key {min(rng.randrange(20), rng.randrange(20))}"
        table = cache.get_or_fetch(key, fetching(key))
        assert table.equals(block(key)), key
        held = [*held[-8:], (key, table)]
    assert all(table.equals(block(key)) for key, table in held)  # most are deleted by now


def test_several_processes_share_a_folder_that_is_too_small(tmp_path: Path) -> None:
    processes = [SPAWN.Process(target=_hammer, args=(tmp_path, seed, 120)) for seed in range(3)]
    for process in processes:
        process.start()
    observer, seen = BlockCache(tmp_path, 5 * BLOCK_BYTES), []
    while any(process.is_alive() for process in processes):
        with observer._locked() as total:  # else files come and go while they are counted
            seen.append((total.value, size(tmp_path)))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert all(said == there for said, there in seen)
    assert 3 * BLOCK_BYTES < max(there for _, there in seen) <= 5 * BLOCK_BYTES
    assert not list(tmp_path.glob("*/*.part"))


def _store_for_ever(folder: Path) -> None:
    cache = BlockCache(folder, 50 * BLOCK_BYTES)
    tables = {f"key {number}": block(f"key {number}") for number in range(10)}
    while True:
        for key, table in tables.items():
            cache._store(cache._path(key), table)
            cache._path(key).unlink()


def test_kills_leave_no_half_blocks_and_no_litter(tmp_path: Path) -> None:
    parts = 0
    for _ in range(8):
        process = SPAWN.Process(target=_store_for_ever, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not list(tmp_path.glob("*/*.part")):
            pass  # killed as soon as a part is seen
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        parts += len(list(tmp_path.glob("*/*.part")))
        if parts:
            break
    assert parts, "no kill came in the middle of a write"
    cache = BlockCache(tmp_path, 50 * BLOCK_BYTES)
    assert not list(tmp_path.glob("*/*.part"))
    before = counters.snapshot()
    for number in range(10):
        assert cache.get_or_fetch(f"key {number}", fetching(f"key {number}")).equals(block(f"key {number}"))
    assert counters.difference(counters.snapshot(), before)["cache_corrupt"] == 0
