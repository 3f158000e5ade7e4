"""The place where a data set appears whole or not at all, on a disk or in a bucket.

Shards are written below `.incoming/`, renamed when all of them are whole, and the manifest follows. What fails is
taken back; what was killed leaves files below `.incoming/`, which the next ingest that succeeds clears away.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath

from pyarrow.fs import FileSelector, FileSystem, FileType

from flam_core.data.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    Manifest,
    one_line,
    read_manifest,
    write_manifest,
)
from flam_core.data.quarantine import BadSource, Quarantine, write_quarantine
from flam_core.data.shard import WrittenShard
from flam_core.data.videos import BadVideo
from flam_core.errors import DataError, EnvironmentFault

_INCOMING = ".incoming"


class Publication:
    """One data set on its way to `root`, beside or instead of the one that is there."""

    def __init__(self, fs: FileSystem, root: str, previous: Manifest | None) -> None:
        """`previous` is the manifest of the data set that is there. Touches nothing yet."""
        self._fs, self._root, self._previous = fs, root, previous
        self._has_folders = fs.type_name != "s3"  # a bucket has none to make
        self._made = _absent(fs, root) if self._has_folders else []
        self._placed: list[str] = []
        self.staging = f"{root}/{_INCOMING}/{uuid.uuid4().hex}"
        """Where shards are written."""

    def prepare(self) -> None:
        """Make the folders. Raises OSError if the storage refuses."""
        if self._has_folders:
            self._fs.create_dir(self.staging)
            self._fs.create_dir(f"{self._root}/shards")

    def publish(self, manifest: Manifest, written: Sequence[WrittenShard], bad: Sequence[BadVideo]) -> None:
        """Give shards their final names, then write what was left out and the manifest.

        Raises OSError or EnvironmentFault if the storage refuses.
        """
        for entry in written:
            self._fs.move(entry.path, f"{self._root}/{entry.shard.name}")
            self._placed.append(entry.shard.name)
        left_out = Quarantine(sources=tuple(BadSource(one.path, one.reason) for one in bad))
        write_quarantine(self._fs, self._root, left_out)
        write_manifest(self._fs, self._root, manifest)

    def take_back(self) -> None:
        """Delete what a failed ingest left, but nothing of a data set that was there, nor of another ingest.

        What cannot be deleted is left: the error that came first is the one to report.
        """
        kept = set() if self._previous is None else {shard.name for shard in self._previous.shards}
        gone = [name for name in self._placed if name not in kept]
        for name in gone + ([QUARANTINE_NAME] if self._previous is None else []):
            with suppress(OSError):
                self._fs.delete_file(f"{self._root}/{name}")
        with suppress(OSError):
            self._fs.delete_dir(self.staging)
        for folder in (f"{self._root}/{_INCOMING}", f"{self._root}/shards", self._root, *self._made):
            with suppress(OSError):
                if not self._fs.get_file_info(FileSelector(folder)):
                    self._fs.delete_dir(folder)

    def clear(self, manifest: Manifest) -> None:
        """Delete what the new data set does not need. What cannot be deleted is only in the way, so it is left."""
        names = {shard.name for shard in manifest.shards}
        for shard in self._previous.shards if self._previous is not None else ():
            if shard.name not in names:
                with suppress(OSError):
                    self._fs.delete_file(f"{self._root}/{shard.name}")
        with suppress(OSError):
            self._fs.delete_dir(f"{self._root}/{_INCOMING}")


def in_the_way(
    fs: FileSystem, root: str, *, name: str, source: str, settings: Mapping[str, object], overwrite: bool
) -> Manifest | None:
    """The manifest that is at `root` already.

    Raises DataError at once if it is of another name, source or settings, or broken, and must be kept;
    EnvironmentFault if the storage does not answer.
    """
    try:
        if fs.get_file_info(f"{root}/{MANIFEST_NAME}").type == FileType.NotFound:
            return None
        previous = read_manifest(fs, root)
    except OSError as error:
        raise EnvironmentFault(f"cannot look at {root}: {one_line(error)}", fix="Check storage and access.") from error
    except DataError:
        if overwrite:
            return None
        raise
    same = (previous.name, previous.source, dict(previous.settings)) == (name, source, settings)
    if not same and not overwrite:
        raise another(root)
    return previous


def another(root: str) -> DataError:
    """The error to raise where another data set is at `root`."""
    return DataError(f"another data set is at {root}", fix="Choose another place, or overwrite it.")


def _absent(fs: FileSystem, root: str) -> list[str]:
    """The folders above `root` that are not there yet, the deepest first."""
    folders = [str(folder) for folder in PurePosixPath(root).parents]
    try:
        return [folder for folder in folders if fs.get_file_info(folder).type == FileType.NotFound]
    except OSError:
        return []  # making them will say what is wrong
