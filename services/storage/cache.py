"""Tables that were fetched from far away, kept on the local disk for the next epoch, process or run.

A block is a file `HH/<sha256 of its key>.block`: an Arrow stream, then a trailer with its length and xxh3 hash. Blocks
are mapped into memory, not read, and checked each time. Several processes may use one folder. Everything that changes
the folder's content holds one lock (`.lock`, which also keeps the sum of sizes), for as long as it takes to write one
block; readers never take it. So a `.part` that the lock's holder finds belongs to a process that died, and is deleted.
Two processes that miss the same block both fetch it and the first one's is kept: simpler than waiting for each other,
and a wait for one that hangs cannot happen.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import xxhash

from flam_core.errors import SettingsError
from services.storage import counters

_MAGIC = b"flamblk1"
_TRAILER = struct.Struct("<8sQQ")  # magic, length and xxh3 of what is before
_SUM = struct.Struct("<Q")
_LOCK_SECONDS = 10.0
_SUFFIX = ".block"


class _Damaged(Exception):
    """A block is not what was written."""


@dataclass
class BlockCache:
    """At most `max_bytes` of blocks in `folder`; the ones not used for longest go first. Can be pickled.

    Whatever goes wrong with the folder (no space, no permission) ends the storing of blocks by this object, with one
    line on the error stream, and never the run. Raises SettingsError if `max_bytes` is below 1.
    """

    folder: Path
    max_bytes: int
    _stores: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise SettingsError(f"cache of {self.max_bytes} bytes", fix="Give 1 or more, or no cache.")
        self.folder = Path(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as total:
                self._clean(total)
        except OSError as error:
            self._stop(error)

    def get_or_fetch(self, key: str, fetch: Callable[[], pa.Table]) -> pa.Table:
        """The table stored under `key`, mapped into memory; if there is none, what `fetch` gives, which is stored.

        The table stays whole when its block is deleted. Raises what `fetch` raises.
        """
        path = self._path(key)
        table = self._load(path)
        if table is not None:
            counters.add(cache_hits=1)
            return table
        counters.add(cache_misses=1)
        table = fetch()
        if self._stores:
            try:
                self._store(path, table)
            except OSError as error:
                self._stop(error)
        return table

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def _load(self, path: Path) -> pa.Table | None:
        try:
            with pa.memory_map(str(path)) as file:
                table = _read(file.read_buffer())
            os.utime(path)  # the time of last use
            return table
        except FileNotFoundError:
            return None  # or deleted for space this moment
        except OSError as error:
            self._stop(error)
            return None
        except (_Damaged, pa.ArrowInvalid) as error:
            counters.add(cache_corrupt=1)
            print(f"flam: cached block {path} is damaged ({error}) and is fetched again", file=sys.stderr, flush=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None

    def _store(self, path: Path, table: pa.Table) -> None:
        content = _pack(table)
        size = content.size + _TRAILER.size
        if size > self.max_bytes:
            return
        with self._locked() as total:
            if path.exists():  # another process was quicker
                return
            if total.value + size > self.max_bytes:
                self._clean(total, room=size)
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            try:
                with part.open("wb") as file:
                    file.write(content)
                    file.write(_TRAILER.pack(_MAGIC, content.size, xxhash.xxh3_64_intdigest(content)))
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            total.value += size

    def _clean(self, total: _Total, room: int = 0) -> None:
        """Count what is there, delete what processes that died left, and the oldest blocks until `room` fits."""
        blocks: list[tuple[int, int, str]] = []
        for shelf in os.scandir(self.folder):
            if not shelf.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(shelf.path):
                with suppress(FileNotFoundError):  # found damaged by a reader this moment
                    if entry.name.endswith(".part"):
                        os.unlink(entry.path)
                    elif entry.name.endswith(_SUFFIX):
                        known = entry.stat(follow_symlinks=False)
                        blocks.append((known.st_mtime_ns, known.st_size, entry.path))
        total.value = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total.value + room <= self.max_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total.value -= size
            counters.add(cache_evicted=1)

    @contextmanager
    def _locked(self) -> Iterator[_Total]:
        """The right to change the folder, with the sum of sizes. Raises TimeoutError if it is held for too long."""
        deadline = time.monotonic() + _LOCK_SECONDS
        with open(self.folder / ".lock", "a+b") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{file.name} is held for {_LOCK_SECONDS:.0f} s") from None
                    time.sleep(0.002)
            file.seek(0)
            kept = file.read(_SUM.size)
            total = _Total(_SUM.unpack(kept)[0] if len(kept) == _SUM.size else self.max_bytes)  # unknown: count
            try:
                yield total
            finally:
                file.truncate(0)
                file.write(_SUM.pack(max(0, total.value)))
                file.flush()

    def _stop(self, error: OSError) -> None:
        if self._stores:
            print(f"flam: the cache {self.folder} stores no more blocks: {error}", file=sys.stderr, flush=True)
        self._stores = False


@lru_cache(maxsize=8)
def shared_cache(folder: Path, max_bytes: int) -> BlockCache:
    """The one cache of this process with these arguments: making one counts what is in the folder."""
    return BlockCache(folder, max_bytes)


@dataclass
class _Total:
    """Bytes of all blocks. Too small by a block where a process died between storing and counting, until counted."""

    value: int


def _pack(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _read(block: pa.Buffer) -> pa.Table:
    """The table in a block, without a copy. Raises _Damaged."""
    if block.size < _TRAILER.size:
        raise _Damaged(f"{block.size} bytes")
    content = block.slice(0, block.size - _TRAILER.size)
    magic, length, digest = _TRAILER.unpack(block.slice(content.size))
    if magic != _MAGIC or length != content.size:
        raise _Damaged("its length is not the one written")
    if xxhash.xxh3_64_intdigest(content) != digest:
        raise _Damaged("its hash is not the one written")
    return pa.ipc.open_stream(content).read_all()
