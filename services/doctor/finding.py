"""What a check says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from flam_core.errors import FlamError


class State(StrEnum):
    """Of what was looked at."""

    OK = "ok"
    NOTE = "note"
    """Works, and somebody should know something about it."""
    RED = "red"


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    state: State
    seen: str
    fix: str = ""
    """What to do about it; empty if it is well."""


def ok(check: str, seen: str) -> Finding:
    """It is well."""
    return Finding(check, State.OK, seen)


def note(check: str, seen: str, fix: str = "") -> Finding:
    """Works, but."""
    return Finding(check, State.NOTE, seen, fix)


def red(check: str, seen: str, fix: str) -> Finding:
    """A run would suffer from it."""
    return Finding(check, State.RED, seen, fix)


def last_line(error: BaseException) -> str:
    """Of what an error says; its kind, if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def attempt(check: str, look: Callable[[], Finding]) -> Finding:
    """What `look` says; an error that it raises is a red finding with the error's own fix."""
    try:
        return look()
    except FlamError as error:
        return red(check, error.what, error.fix)
