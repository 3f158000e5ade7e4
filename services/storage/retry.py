"""The one place where a request to object storage is sent again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from services.storage import counters
from services.storage.faults import GaveUp, retry_kind

FIRST_WAIT_SECONDS = 0.1
"""A wait is random between nothing and this, doubled at each try (exponential backoff with full jitter)."""
LONGEST_WAIT_SECONDS = 10.0
DENIED_RETRIES = 2
"""How often a 403 is asked again where an earlier request was served."""

CHAOS_SHARE = "FLAM_CHAOS_S3_503"
"""Environment variable: the share of requests that is answered with 503 without being sent (`--chaos s3-503`)."""

T = TypeVar("T")


def retried(request: Callable[[], T], *, seconds: float, served_before: bool = False) -> T:
    """Send a request until it is answered, at most for `seconds`; each try and wait is counted (`counters`).

    `request` must be safe to repeat. `served_before` says that the storage has let this process in before: only then is
    a 403 taken for a sign of overload, and asked again twice. Raises what `request` raises where asking again does not
    help, GaveUp when the time is over; no try begins after it, but one that began before it is waited for.
    """
    denied = 0

    def send() -> T:
        counters.add(requests=1)
        if random.random() < _chaos_share():
            _say_once()
            raise OSError("AWS Error SLOW_DOWN (HTTP status 503): chaos")
        return request()

    def helps(error: BaseException) -> bool:
        nonlocal denied
        kind = retry_kind(error)
        if kind == "denied":
            denied += 1
            return served_before and denied <= DENIED_RETRIES
        return kind is not None

    started = time.monotonic()
    loop = Retrying(
        retry=retry_if_exception(helps),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
        stop=stop_before_delay(seconds),
        before_sleep=_count,
    )
    try:
        return loop(send)
    except RetryError as end:
        counters.add(gave_up=1)
        last, tries = end.last_attempt.exception(), end.last_attempt.attempt_number
        text = " ".join(str(last).split())
        said = f"{text} after {tries} {'try' if tries == 1 else 'tries'} in {time.monotonic() - started:.0f} s"
        raise GaveUp(said) from last


@cache
def _say_once() -> None:
    print(f"chaos: s3-503: requests of process {os.getpid()} are answered with 503", flush=True)


def _chaos_share() -> float:
    return float(os.environ.get(CHAOS_SHARE, "0"))


def _count(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    kind = retry_kind(error) if error else None
    counters.add(**{f"retries_{kind}": 1, "wait_seconds": state.upcoming_sleep})
