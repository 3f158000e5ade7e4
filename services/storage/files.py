"""Objects as files: reading by ranges that are fetched again one by one, writing as a whole or in parts."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import pyarrow as pa

from services.storage import counters
from services.storage.faults import ShortRead, is_missing, retry_kind

RANGE_BYTES = 32 << 20
"""No request asks for more, so that a cut costs no more than this. Parquet's readers have the same limit."""
_AHEAD_BYTES = 8 << 20
# pyarrow receives the text of a refusal into the room for the content; if that is too small, every refusal looks like
# a failing server. S3's texts are shorter than this.
_ANSWER_BYTES = 8 << 10


class Retry(Protocol):
    """Sends a request about a path until it is answered."""

    def __call__(self, path: str, request: Callable[[], Any], /) -> Any:
        """See `RetryingHandler.retry`."""
        ...


class RangeFile:
    """An object open for reading, for `pa.PythonFile`, which lets one thread in at a time."""

    closed = False

    def __init__(
        self,
        path: str,
        opened: pa.NativeFile,
        *,
        retry: Retry,
        look: Callable[[], object],
        lost: Callable[[], None],
    ) -> None:
        """`opened` answers `read_at`, `look` raises OSError if the object cannot be had, `lost` is told so."""
        self._path = path
        self._opened = opened
        self._retry = retry
        self._look = look
        self._lost = lost
        self._position = 0
        self.size: int = opened.size()

    def fetch(self, start: int, stop: int) -> bytes | pa.Buffer:
        """The bytes from `start` to before `stop`, without a copy if it is one request.

        Raises FileNotFoundError if the object is gone, GaveUp and other OSError as the storage answers.
        """
        if stop - start <= RANGE_BYTES:
            return self._request(start, stop) if stop > start else b""
        whole = pa.allocate_buffer(stop - start)
        view = memoryview(whole).cast("B")
        for piece in range(start, stop, RANGE_BYTES):
            end = min(piece + RANGE_BYTES, stop)
            view[piece - start : end - start] = self._request(piece, end)
        return whole

    def _request(self, start: int, stop: int) -> bytes:
        def send() -> bytes:
            try:
                content = self._opened.read_at(stop - start, start)
            except OSError as error:
                if stop - start < _ANSWER_BYTES and retry_kind(error) == "server":
                    self._look()
                raise
            if len(content) != stop - start:
                raise ShortRead(f"{self._path}: {len(content)} bytes came of {stop - start} from {start} on")
            return content

        try:
            content = self._retry(self._path, send)
        except OSError as error:
            self._lost()
            if is_missing(error):
                raise FileNotFoundError(f"{self._path} is gone") from error
            raise
        counters.add(bytes_read=len(content))
        return content

    def read(self, size: int = -1) -> bytes | pa.Buffer:
        """Up to `size` bytes from the position on; all if negative."""
        stop = self.size if size < 0 else min(self._position + size, self.size)
        content = self.fetch(self._position, stop)
        self._position = max(self._position, stop)
        return content

    def read_buffer(self, size: int = -1) -> bytes | pa.Buffer:
        """The same: pyarrow asks for this where it can keep the buffer and not copy it."""
        return self.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; no request."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Nothing is held open in the store."""
        self.closed = True


class ReadAhead:
    """An object read from its beginning, for `pa.PythonFile`: many small reads are few requests."""

    closed = False

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._position = 0
        self._ahead = memoryview(b"")

    def read(self, size: int = -1) -> memoryview:
        """Up to `size` bytes from the position on; all if negative."""
        wanted = self._file.size - self._position
        wanted = wanted if size < 0 else min(size, wanted)
        if (missing := wanted - len(self._ahead)) > 0:
            start = self._position + len(self._ahead)
            content = self._file.fetch(start, min(self._file.size, start + max(missing, _AHEAD_BYTES)))
            rest = self._ahead
            self._ahead = memoryview(content).cast("B") if not rest else memoryview(rest.tobytes() + bytes(content))
        answer, self._ahead = self._ahead[:wanted], self._ahead[wanted:]
        self._position += wanted
        return answer

    def tell(self) -> int:
        """The position."""
        return self._position

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """No: a stream goes forward only."""
        return False

    def close(self) -> None:
        """Nothing is held open in the store."""
        self.closed = True


class Upload:
    """An object open for writing, for `pa.PythonFile`: a small one goes out whole at `close`, a larger one in parts.

    After an error nothing more is sent, so that what is not whole does not appear.
    """

    closed = False

    def __init__(self, whole: Callable[[bytes], None], in_parts: Callable[[], pa.NativeFile], whole_bytes: int) -> None:
        self._whole = whole
        self._in_parts = in_parts
        self._whole_bytes = whole_bytes
        self._waiting: list[bytes] = []
        self._size = 0
        self._stream: pa.NativeFile | None = None
        self._error: OSError | None = None

    def write(self, content: bytes | pa.Buffer) -> int:
        """Take bytes. Raises OSError if a part cannot be sent."""
        if self._error is not None:
            raise self._error
        self._size += len(content)
        self._waiting.append(bytes(content))  # it may be a buffer that its owner uses again
        if self._size > self._whole_bytes:
            try:
                self._send()
            except OSError as error:
                self._error = error
                raise
        return len(content)

    def _send(self) -> None:
        stream = self._stream
        if stream is None:
            counters.add(requests=1)
            stream = self._stream = self._in_parts()
        for content in self._waiting:
            stream.write(content)
        self._waiting.clear()

    def flush(self) -> None:
        """Nothing: what is not complete is not seen."""

    def tell(self) -> int:
        """Bytes taken."""
        return self._size

    def writable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Send what is left; the object appears. Raises OSError if the storage does not take it, or did not before."""
        if self.closed:
            return
        self.closed = True
        if self._error is not None:
            if self._stream is not None:
                with suppress(OSError):  # it has failed, and ends without an object
                    self._stream.close()
            raise self._error
        if self._stream is None:
            self._whole(b"".join(self._waiting))
        else:
            self._stream.close()
            counters.add(bytes_written=self._size)
