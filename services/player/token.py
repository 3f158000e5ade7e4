"""The token that a server beyond this machine asks for."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address

from flam_core.errors import SettingsError

COOKIE = "flam_token"
VARIABLE = "FLAM_PLAYER_TOKEN"
_LEAST = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to `host`."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def choose_token(given: str | None, host: str, *, shared: bool = False) -> str | None:
    """The given one, that of the environment, or a fresh one where others can reach the server; else None.

    shared: it is on a cluster, whose head listens where it was told to.

    Raises SettingsError for one that can be guessed.
    """
    token = given or os.environ.get(VARIABLE) or None
    if token is None:
        return None if is_loopback(host) and not shared else secrets.token_urlsafe(24)
    if len(token) < _LEAST or not token.isascii() or not token.isprintable() or any(c in token for c in ' ";,\\'):
        raise SettingsError(
            f"the token has {len(token)} characters, or some that no header takes",
            fix=f"Give {_LEAST} or more letters and digits, or none: one is then made.",
        )
    return token


def digest(token: str) -> bytes:
    """What the server knows of the token. It never has the token itself, so it can neither log nor show it."""
    return hashlib.sha256(token.encode()).digest()


def allowed(headers: Mapping[str, str], meant: bytes) -> bool:
    """Whether a request's headers (names in lower case) carry the token, as `Authorization: Bearer` or as cookie."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return matches(given.strip(), meant)
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return morsel is not None and matches(morsel.value, meant)


def matches(given: str, meant: bytes) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(digest(given), meant)
