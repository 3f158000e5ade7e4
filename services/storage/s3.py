"""Object storage as a pyarrow file system whose every request survives bad days.

`RetryingS3` gives what `pyarrow.fs.S3FileSystem` gives, to all who take a file system: Parquet readers, Ray, our own
code. The difference: requests are sent again by `retry` alone, with a limit in seconds and counted; pyarrow's own
retries are off. Only the parts of uploads above 8 MB are left to them, as a part cannot be sent again from outside.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import pyarrow as pa
from pyarrow.fs import AwsDefaultS3RetryStrategy, FileInfo, FileSelector, FileSystemHandler, PyFileSystem, S3FileSystem

from services.storage import counters
from services.storage.faults import bucket_of, is_missing
from services.storage.files import RangeFile, ReadAhead, Upload
from services.storage.retry import retried

WHOLE_BYTES = 8 << 20
"""Objects up to this size are sent in one request, sent again as a whole."""
_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 30.0
_SDK_FIRST_WAIT_SECONDS = 0.025
_OPENED_AT_MOST = 4096
# Whom a client was made for: it reads them once.
_IDENTITY = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)

T = TypeVar("T")


@dataclass(frozen=True)
class S3Settings:
    """How to reach a store. Keys are not among them: each process takes its own from the environment."""

    region: str
    endpoint: str = ""
    """`http://host:port`; empty for AWS."""
    retry_seconds: float = 120.0
    """How long one request is tried."""

    @property
    def request_seconds(self) -> float:
        """How long a store may be silent: short enough that a request that hangs is tried again."""
        return min(_REQUEST_SECONDS, max(1.0, self.retry_seconds / 4))

    def for_requests(self) -> S3FileSystem:
        """A client that never sends a request again, and an object of up to `WHOLE_BYTES` in one request."""
        # Threads of pyarrow's pool that send small objects must not wait for others of it: no background writes.
        return self._open(sdk_retries=0, background_writes=False, allow_delayed_open=True)

    def for_uploads(self) -> S3FileSystem:
        """A client for objects in parts, which sends a part again for about `retry_seconds`.

        In pyarrow 25 an upload that fails must neither write in the foreground nor open late: closing it, or just
        dropping it, would complete it with what arrived: a torn object.
        """
        # Each wait of the SDK is twice the one before.
        sdk_retries = math.ceil(math.log2(self.retry_seconds / _SDK_FIRST_WAIT_SECONDS + 1))
        return self._open(sdk_retries=sdk_retries, background_writes=True, allow_delayed_open=False)

    def _open(self, *, sdk_retries: int, background_writes: bool, allow_delayed_open: bool) -> S3FileSystem:
        scheme, _, host = self.endpoint.rpartition("://")
        options = {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"} if self.endpoint else {}
        return S3FileSystem(
            region=self.region,
            connect_timeout=min(_CONNECT_SECONDS, self.request_seconds),
            request_timeout=self.request_seconds,
            retry_strategy=AwsDefaultS3RetryStrategy(max_attempts=sdk_retries),  # the first try is not counted
            allow_bucket_creation=False,
            allow_delayed_open=allow_delayed_open,
            background_writes=background_writes,
            **options,
        )


@dataclass
class _Client:
    """What a process shares among all file systems with the same settings and keys."""

    plain: S3FileSystem
    uploads: S3FileSystem
    served: set[str] = field(default_factory=set)
    """Buckets that answered a request of this process."""
    opened: OrderedDict[str, pa.NativeFile] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@lru_cache(maxsize=16)
def _client(settings: S3Settings, identity: tuple[str | None, ...]) -> _Client:
    return _Client(settings.for_requests(), settings.for_uploads())


class RetryingHandler(FileSystemHandler):
    """The requests of `RetryingS3`. All raise OSError: GaveUp after retries, FileNotFoundError for what is missing."""

    def __init__(self, settings: S3Settings, *, unchanging: bool = False, checked: str = "") -> None:
        """`unchanging`: objects are never overwritten, so that what is known of one is kept. `checked`: a bucket that
        is known to answer, so that a 403 from it may be asked again."""
        self.settings = settings
        self.unchanging = unchanging
        self.checked = checked
        self._client = _client(settings, tuple(os.environ.get(name) for name in _IDENTITY))

    def __reduce__(self) -> tuple[Any, ...]:
        return _handler, (self.settings, self.unchanging, self.checked)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryingHandler) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)

    def retry(self, path: str, request: Callable[[], T]) -> T:
        """Send a request about `path` until it is answered. Raises as `retried` does."""
        bucket = bucket_of(path)
        served_before = bucket == self.checked or bucket in self._client.served
        answer = retried(request, seconds=self.settings.retry_seconds, served_before=served_before)
        self._client.served.add(bucket)
        return answer

    def _once(self, path: str, request: Callable[[], None]) -> None:
        """Send a request that takes something away: sent again, it may find that it was done."""
        tries = 0

        def send() -> None:
            nonlocal tries
            tries += 1
            try:
                request()
            except OSError as error:
                if tries == 1 or not is_missing(error):
                    raise

        self.retry(path, send)

    def get_type_name(self) -> str:
        """See `RetryingS3.type_name`."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """As pyarrow does."""
        return self._client.plain.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """Of each path. One that is no object costs a listing of one entry: `objects.exists` does without."""
        return [self.retry(path, partial(self._client.plain.get_file_info, path)) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """Of all below a prefix, by listing."""
        return self.retry(selector.base_dir, lambda: self._client.plain.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """An empty object that marks a folder."""
        self.retry(path, lambda: self._client.plain.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        """Delete all below a prefix."""
        self._once(path, lambda: self._client.plain.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete all below a prefix but the prefix itself."""
        self._once(path, lambda: self._client.plain.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        """Never: it would delete all buckets."""
        raise OSError("flam does not delete all buckets of a store")

    def delete_file(self, path: str) -> None:
        """Delete an object."""
        self._forget(path)
        self._once(path, lambda: self._client.plain.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        """Copy, then delete."""
        if src != dest:
            self.copy_file(src, dest)
            self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy an object inside the store."""
        self._forget(dest)
        self.retry(dest, lambda: self._client.plain.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Read an object from its beginning, in requests of 8 MB or more."""
        return pa.PythonFile(ReadAhead(self._range_file(path)), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Read an object by ranges, one request each."""
        return pa.PythonFile(self._range_file(path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Write an object, which appears when the stream is closed."""
        self._forget(path)
        return pa.PythonFile(
            Upload(
                whole=lambda content: self.put(path, content, metadata),
                in_parts=lambda: self._client.uploads.open_output_stream(path, metadata=metadata),
                whole_bytes=WHOLE_BYTES,
            ),
            mode="w",
        )

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Object stores cannot append."""
        raise OSError(f"{path} is an object and cannot be appended to")

    def put(self, path: str, content: bytes, metadata: Any = None) -> None:
        """Write an object as a whole, again as a whole if it fails on the way."""
        client = self._client.plain if len(content) <= WHOLE_BYTES else self._client.uploads

        def send() -> None:
            with client.open_output_stream(path, metadata=metadata) as stream:
                stream.write(content)  # in one call: pyarrow would complete what an interrupt leaves in the middle

        self._forget(path)
        self.retry(path, send)
        counters.add(bytes_written=len(content))

    def _range_file(self, path: str) -> RangeFile:
        return RangeFile(
            path,
            self._opened(path),
            retry=self.retry,
            look=lambda: self._client.plain.open_input_file(path),
            lost=lambda: self._forget(path),
        )

    def _opened(self, path: str) -> pa.NativeFile:
        """The object's length and what reads it: a HEAD, or none if it is known."""
        client = self._client
        if self.unchanging:
            with client.lock:
                if path in client.opened:
                    client.opened.move_to_end(path)
                    return client.opened[path]
        file = self.retry(path, lambda: client.plain.open_input_file(path))
        if self.unchanging:
            with client.lock:
                client.opened[path] = file
                while len(client.opened) > _OPENED_AT_MOST:
                    client.opened.popitem(last=False)
        return file

    def _forget(self, path: str) -> None:
        with self._client.lock:
            self._client.opened.pop(path, None)


def _handler(settings: S3Settings, unchanging: bool, checked: str) -> RetryingHandler:
    return RetryingHandler(settings, unchanging=unchanging, checked=checked)


class RetryingS3(PyFileSystem):
    """The file system. Pickled, it takes its settings along and the keys of the process that it arrives in."""

    @property
    def type_name(self) -> str:
        """`s3`, as of pyarrow's own; by itself it would be `py::s3`."""
        return "s3"

    @property
    def requests(self) -> RetryingHandler:
        """The handler, by its type."""
        return cast(RetryingHandler, self.handler)

    def __reduce__(self) -> tuple[Any, ...]:
        return RetryingS3, (self.handler,)
