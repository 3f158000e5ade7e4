"""An HTTP proxy that stands before a storage and gives scripted requests bad answers.

The storage's client takes the proxy as its endpoint. Requests reach the storage as they were sent, `Host` included: a
signature covers it, and while moto accepts any signature, Ceph's gateway does not. So the proxy can stand before both.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

STATUS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "ServiceUnavailable", "Service is unable to handle request."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "429": (429, "TooManyRequests", "Please reduce your request rate."),
    "403": (403, "AccessDenied", "Access Denied"),
    "404": (404, "NoSuchKey", "The specified key does not exist."),
    "signature": (403, "SignatureDoesNotMatch", "The request signature we calculated does not match."),
}
"""Faults that are answers: HTTP status, S3's code, S3's message."""
FAULTS = (*STATUS, "slow", "cut", "reset", "hang")
"""All faults: also an answer that comes late, one cut in the middle, a connection reset before any, none at all."""
_SLOW_SECONDS = 0.3


@dataclass(frozen=True)
class Seen:
    """A request that reached the proxy."""

    method: str
    path: str
    range: str
    """The Range header, empty if there was none."""
    fault: str
    """What was done to it, empty if nothing."""


@dataclass
class FaultProxy:
    """What to do to the next requests, and what was done to the past ones. Used by many threads."""

    url: str
    upstream: tuple[str, int]
    seen: list[Seen] = field(default_factory=list)
    _script: deque[tuple[str, str]] = field(default_factory=deque)
    _always: tuple[str, str] = ("", "")
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _released: threading.Event = field(default_factory=threading.Event)

    def script(self, *faults: str, method: str = "") -> None:
        """What the next requests (of `method`, if given) meet, in turn: a fault each, or "" for none."""
        with self._lock:
            self._script.extend((fault, method) for fault in faults)

    def always(self, fault: str, method: str = "") -> None:
        """What every request (of `method`, if given) meets that the script has nothing for; "" for none."""
        with self._lock:
            self._always = (fault, method)

    def clear(self) -> None:
        """Forget the script and what was seen."""
        with self._lock:
            self._script.clear()
            self.seen.clear()
            self._always = ("", "")

    @property
    def pending(self) -> int:
        """Entries of the script that no request has met yet."""
        with self._lock:
            return len(self._script)

    def methods(self) -> Counter[str]:
        """How many requests of each method were seen."""
        with self._lock:
            return Counter(one.method for one in self.seen)

    def meet(self, method: str, path: str, span: str) -> str:
        """Note a request; the fault it meets."""
        with self._lock:
            fault = ""
            if self._script:
                if self._script[0][1] in ("", method):
                    fault = self._script.popleft()[0]
            elif self._always[1] in ("", method):
                fault = self._always[0]
            self.seen.append(Seen(method, path, span, fault))
            return fault

    def wait(self, seconds: float) -> None:
        """Until so many seconds are over or the proxy ends."""
        self._released.wait(seconds)

    def release(self) -> None:
        """Let go of the requests that wait."""
        self._released.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    _upstream: http.client.HTTPConnection | None = None

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for it
        return True

    def _serve(self) -> None:
        proxy = cast(_Server, self.server).proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.meet(self.command, self.path, self.headers.get("Range") or "")
        if fault in STATUS:
            self._refuse(*STATUS[fault])
        elif fault == "reset":
            self._reset()
        elif fault == "hang":
            proxy.wait(60)
            self.close_connection = True
        else:
            if fault == "slow":
                proxy.wait(_SLOW_SECONDS)
            self._pass_on(proxy.upstream, body, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _pass_on(self, upstream: tuple[str, int], body: bytes, *, cut: bool) -> None:
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(*upstream, timeout=60)
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                self._upstream.putheader(name, value)
        self._upstream.endheaders(body or None)
        answer = self._upstream.getresponse()
        content = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        if length is not None and answer.status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self._reset() if not content else self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was seen is in `FaultProxy.seen`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):  # the handler may have reset it
            super().shutdown_request(request)


@contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before the storage at the address `upstream` (`http://host:port`); its own is `url`."""
    parts = urlsplit(upstream)
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", (str(parts.hostname), parts.port or 80))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.proxy
        finally:
            server.proxy.release()
            server.shutdown()
            thread.join()
