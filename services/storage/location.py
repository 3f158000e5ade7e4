"""From an address to a file system and a path."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from flam_core.errors import SettingsError
from services.storage.faults import CHECKSUMS, RETRY_SECONDS, bucket_of, no_bucket, storage_fault
from services.storage.s3 import RetryingHandler, RetryingS3, S3Settings

_RETRY_SECONDS = 120.0
# A first question is asked for less long, so that a wrong address is known in seconds.
_CHECK_SECONDS = 10.0


def _relax_checksums() -> None:
    """Stores other than AWS refuse the checksums that clients send by default."""
    if endpoint():
        for name in CHECKSUMS:
            os.environ.setdefault(name, "when_required")


def endpoint() -> str:
    """Of the store, if it is not AWS; else empty."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


_relax_checksums()  # on import too: a worker that unpickles a Location never calls `resolve`


@dataclass(frozen=True)
class Location:
    """A place in a storage. `fs` can be pickled and sent to other processes."""

    fs: FileSystem = field(compare=False)
    path: str
    """As `fs` names it: no scheme, no slash at the end."""
    uri: str
    """As people write it."""

    def __truediv__(self, name: str) -> Location:
        return Location(self.fs, f"{self.path}/{name}", f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def local(self) -> bool:
        """Whether it lies on this host's disk."""
        return self.fs.type_name == "local"

    def unchanging(self) -> Location:
        """The same place, whose objects nobody overwrites, such as a data set's shards.

        In a bucket, a process then asks for an object's length once and not each time that it is opened: one request
        less a row group. What was overwritten after all shows as a damaged or missing object.
        """
        if not isinstance(self.fs, RetryingS3):
            return self
        known = self.fs.requests
        return replace(self, fs=RetryingS3(RetryingHandler(known.settings, unchanging=True, checked=known.checked)))


def resolve(address: str | Path, *, check: bool = True) -> Location:
    """The location of a local path or an `s3://bucket/prefix`.

    With `check`, the bucket is asked for, so that a wrong address or key shows here and not in the middle of a run.
    A request to a bucket that fails is sent again for up to FLAM_STORAGE_RETRY_SECONDS (120 by default), this first one
    for up to 10. Raises SettingsError for an address that is neither and for a number of seconds that is none,
    EnvironmentFault if the bucket does not answer, does not exist or forbids.
    """
    text = str(address).rstrip("/")
    scheme, separator, rest = text.partition("://")
    if not separator:
        path = str(Path(text).expanduser().absolute())
        return Location(LocalFileSystem(), path, path)
    if scheme == "file":
        return Location(LocalFileSystem(), rest, rest)
    if scheme != "s3" or not rest:
        raise SettingsError(f"{text} is not an address flam can use", fix="Give a path or s3://bucket/prefix.")
    settings = _settings()
    if check:
        _check_bucket(settings, text)
    return Location(RetryingS3(RetryingHandler(settings, checked=bucket_of(text) if check else "")), rest, text)


def _settings() -> S3Settings:
    _relax_checksums()
    return S3Settings(
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        endpoint=endpoint(),
        retry_seconds=_retry_seconds(),
    )


def _retry_seconds() -> float:
    text = os.environ.get(RETRY_SECONDS) or str(_RETRY_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SettingsError(f"{RETRY_SECONDS} is {text!r}", fix="Give a number of seconds above 0.")
    return seconds


def _check_bucket(settings: S3Settings, uri: str) -> None:
    settings = replace(settings, retry_seconds=min(_CHECK_SECONDS, settings.retry_seconds))
    try:
        (found,) = RetryingHandler(settings).get_file_info([bucket_of(uri)])
    except OSError as error:
        raise storage_fault(error, uri) from error
    if found.type == FileType.NotFound:
        raise no_bucket(uri)
