"""What this process asked of object storage and of the local cache, counted since it started."""

from __future__ import annotations

import threading
from collections.abc import Mapping

RETRY_KINDS = ("throttled", "server", "timeout", "connection", "cut", "denied")
"""Why a request was sent again: see `faults.retry_kind`."""

_NAMES = (
    "requests",
    "bytes_read",
    "bytes_written",
    "wait_seconds",
    "gave_up",
    "cache_hits",
    "cache_misses",
    "cache_corrupt",
    "cache_evicted",
    *(f"retries_{kind}" for kind in RETRY_KINDS),
)
_lock = threading.Lock()
_totals: dict[str, float] = dict.fromkeys(_NAMES, 0.0)


def add(**amounts: float) -> None:
    """Add to the totals of this process. Raises KeyError for a name that is none of theirs."""
    with _lock:
        for name, amount in amounts.items():
            _totals[name] += amount


def snapshot() -> dict[str, float]:
    """The totals now; every name is there from the start.

    `requests`: calls to the storage, those sent again included; the parts of a large upload and the pages of a
    listing, which pyarrow sends by itself, count as one. `bytes_read`, `bytes_written`: of objects, once each.
    `wait_seconds`: slept between tries, summed over threads. `gave_up`: requests that failed to the end.
    `retries_KIND`: tries after the first. `cache_*`: blocks found, not found, found damaged, deleted for space.
    """
    with _lock:
        return dict(_totals)


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was counted between two snapshots."""
    return {name: total - before.get(name, 0.0) for name, total in after.items()}
