"""What stands before every request: who may ask, how much, and how many at a time. It reads no body for the rest."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flam_core.errors import FlamError
from services.player.errors import RETRY_SECONDS, Broken, Busy, Foreign, Slow, TooLarge, Unauthorized, status_of
from services.player.settings import Limits
from services.player.token import COOKIE, allowed, matches

LOG = logging.getLogger("ray.serve")
HEALTH = "/health"
SEE_LOGS = "Tell who runs it: Ray Serve's logs say more."
_BODY_SECONDS = 30.0
_HEADERS = (
    # The page needs nothing but its own files, and pictures it is sent.
    ("content-security-policy", "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
)


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    token: bytes | None
    """Its digest (`token.digest`); None: everybody may."""
    hosts: tuple[str, ...] | None
    """Names that a request may know the server by. A page of another site that has its own name point here is then
    refused, which matters where there is no token. None: any."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._most_bytes = int(limits.body_mb * 1e6)
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._pass_on(scope, receive, tell)
        except FlamError as error:
            await refuse(error, _with_headers(tell))
        except Exception:
            LOG.exception("%s %s", scope["method"], scope["path"])
            if begun:  # half an answer is out
                raise
            await refuse(Broken("the server met an error of its own", fix=SEE_LOGS), _with_headers(tell))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the request is refused for."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_host(headers)
        if scope["path"] != HEALTH and self._access.token is not None:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if scope["path"] == "/" and matches(given, self._access.token):
                await _let_in(given, headers, scope, send)
                return
            if not allowed(headers, self._access.token):
                raise Unauthorized(
                    "this server asks for its token",
                    fix="Open the address with ?token=... that it printed, or send it as Authorization: Bearer.",
                )
        if scope["path"] == HEALTH:  # who is busy is well; no body of it is read, so that nothing piles up
            await self._app(scope, _replay(b"", receive), _with_headers(send))
            return
        # Requests that wait inside hold their bodies in memory.
        if self._inside >= 2 * self._limits.queue:
            raise Busy("the server is busy", fix="Come again.")
        self._inside += 1
        try:
            body = await self._body_in_time(headers, receive)
            await self._app(scope, _replay(body, receive), _with_headers(send))
        finally:
            self._inside -= 1

    def _check_host(self, headers: Mapping[str, str]) -> None:
        if self._access.hosts is None:
            return
        host = headers.get("host", "")
        name = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
        if name.strip("[]").lower() not in self._access.hosts:
            raise Foreign(
                "the request names a host that this server does not go by",
                fix="Use the address that it printed, or start it with --allow_host.",
            )

    async def _body_in_time(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """Raises TooLarge as soon as it is known, Slow for one that does not come."""
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                return await self._body(headers, receive)
        except TimeoutError as error:
            raise Slow(f"the request did not come within {_BODY_SECONDS:.0f} s", fix="Send it anew.") from error

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        stated = headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > self._most_bytes:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request has more than {self._limits.body_mb:g} MB", fix="Send a shorter clip.")


async def refuse(error: FlamError, send: Send) -> None:
    """Answer with an error as JSON."""
    status = status_of(error)
    headers = [(b"content-type", b"application/json")]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error.what, "fix": error.fix}).encode()})


async def _let_in(token: str, headers: Mapping[str, str], scope: Scope, send: Send) -> None:
    """Put the token into a cookie and the address without it into the browser."""
    secure = "; Secure" if headers.get("x-forwarded-proto", scope.get("scheme")) == "https" else ""
    cookie = f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/{secure}"
    answer = [(b"location", b"./"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
    start = {"type": "http.response.start", "status": HTTPStatus.SEE_OTHER, "headers": answer}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": b""})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what else comes (that the client is gone)."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            known = {name for name, _ in message.get("headers", [])}
            extra = [(n.encode(), v.encode()) for n, v in _HEADERS if n.encode() not in known]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return wrapped
