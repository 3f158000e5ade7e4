"""Finding and opening files of a source, on any file system that pyarrow knows: a local disk or a bucket."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from flam_core.data.manifest import one_line
from flam_core.data.videos import Unusable
from flam_core.errors import DataError, EnvironmentFault

_BUFFER_BYTES = 8 << 20  # a range request of a bucket costs as much as megabytes
_GLOB = frozenset("*?[")
_FIX = "Check storage and access."


def find_files(fs: FileSystem, path: str, suffixes: tuple[str, ...], what: str) -> list[tuple[str, str]]:
    """(path, name below the folder) of each file that `path` means, sorted: the file itself, all below a folder that
    end in one of `suffixes`, or all that match a pattern with `*`, `?` or `[...]` in its last parts.

    `what` names the kind in messages. Raises DataError if there is none, EnvironmentFault if the storage fails.
    """
    path = path.rstrip("/")
    pattern = None
    base = path
    if _GLOB & set(path):
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if _GLOB & set(part))
        base, pattern = "/".join(parts[:first]) or ("/" if path.startswith("/") else "."), path
    try:
        info = fs.get_file_info(base)
        if info.type == FileType.NotFound:
            raise DataError(f"{base} does not exist", fix=_like(fs, base) or "Check the path.")
        if info.type == FileType.File:
            return [(path, PurePosixPath(path).name)]
        listed = cast(list[FileInfo], fs.get_file_info(FileSelector(base, recursive=True)))
    except OSError as error:
        raise EnvironmentFault(f"cannot look at {base}: {one_line(error)}", fix=_FIX) from error
    names = sorted(one.path for one in listed if one.type == FileType.File)
    if pattern is None:
        found = [name for name in names if name.lower().endswith(suffixes)]
    else:
        depth = len(PurePosixPath(pattern).parts)
        found = [
            name for name in names if PurePosixPath(name).match(pattern) and len(PurePosixPath(name).parts) == depth
        ]
    if not found:
        raise DataError(f"no {what} in {path}", fix=f"They must end in {', '.join(suffixes)}.")
    return [(name, PurePosixPath(name).relative_to(base).as_posix()) for name in found]


def _like(fs: FileSystem, path: str) -> str:
    """'Did you mean ...?' if a neighbour of a missing path is called like it, else nothing."""
    parent, _, name = path.rpartition("/")
    neighbours = cast(list[FileInfo], fs.get_file_info(FileSelector(parent or "/", allow_not_found=True)))
    return did_you_mean(name, [one.base_name for one in neighbours])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'Did you mean 'x'?' if something known is like `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def open_stream(fs: FileSystem, path: str) -> pa.NativeFile:
    """A file to be read from its beginning to its end, as it is. Raises OSError."""
    return fs.open_input_stream(path, compression=None, buffer_size=_BUFFER_BYTES)


def open_video_file(fs: FileSystem, path: str) -> Path | BinaryIO:
    """A file for `open_video`: by its path where FFmpeg can read it itself, else through the file system.

    Raises FileNotFoundError if it is missing, EnvironmentFault, then or on reading, if the storage fails.
    """
    if fs.type_name == "local":
        Path(path).stat()
        return Path(path)
    try:
        return cast(BinaryIO, io.BufferedReader(_Raw(fs.open_input_file(path), path), _BUFFER_BYTES))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {one_line(error)}", fix=_FIX) from error


@contextmanager
def open_parquet(fs: FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file. Raises, also out of the block that reads it, Unusable if it is missing or damaged,
    EnvironmentFault if the storage fails."""
    try:
        file = fs.open_input_file(path)
    except FileNotFoundError as error:
        raise Unusable("missing") from error
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {one_line(error)}", fix=_FIX) from error
    try:
        with pa.PythonFile(_Raw(file, path), mode="r") as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:  # those of the storage have become another by now
        raise Unusable(f"truncated or damaged: {one_line(error)}") from error


class _Raw(io.RawIOBase):
    """A pyarrow file as Python's own buffers want it. A storage that fails must not be taken for a damaged video."""

    def __init__(self, file: pa.NativeFile, path: str) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:  # any buffer, as io.RawIOBase has it
        try:
            return self._file.readinto(buffer)
        except OSError as error:
            raise EnvironmentFault(f"cannot read {self._path}: {one_line(error)}", fix=_FIX) from error

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def place_name(path: str) -> str:
    """What a source at `path` is called: the folder of a pattern, a file without its suffix, or the last part."""
    parts = [part for part in path.split("/") if part]
    while parts and _GLOB & set(parts[-1]):
        parts.pop()
    return re.sub(r"\.(tar|tar\.gz|tgz|parquet)$", "", parts[-1]) if parts else "data"
