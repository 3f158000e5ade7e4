"""What the player refuses, and as which HTTP status."""

from __future__ import annotations

from flam_core.errors import DataError, EnvironmentFault, FlamError, SettingsError, unpack


class Unauthorized(SettingsError):
    """A request without the token."""


class Foreign(SettingsError):
    """A request that names another host."""


class Gone(DataError):
    """A session that is not there, or no longer."""


class TooLarge(DataError):
    """A request with more bytes than the server reads."""


class Slow(DataError):
    """A request whose body did not come in time."""


class Broken(FlamError):
    """A fault of the server itself, of which no more is said to who asked."""


class Busy(EnvironmentFault):
    """More work than the server takes on: come again."""


RETRY_SECONDS = 1
"""What a busy server says in `Retry-After`."""
_STATUS: tuple[tuple[type[FlamError], int], ...] = (
    (Unauthorized, 401),
    (Foreign, 403),
    (Gone, 404),
    (Slow, 408),
    (TooLarge, 413),
    (Busy, 503),
    (EnvironmentFault, 503),
    (DataError, 422),
    (SettingsError, 422),
)


def status_of(error: FlamError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def unusable(failed: str) -> EnvironmentFault:
    """What is answered instead of a process that could not start; failed: why, as `flam_core.errors.pack` gave it."""
    why = unpack(failed)
    return EnvironmentFault(f"the process with the model could not start, and is tried again: {why.what}", fix=why.fix)
