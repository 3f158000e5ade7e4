"""Tracking: one MLflow run per logical flam run, reopened on resume, with no step logged twice."""

from services.tracking.journal import Journal, Line, segments
from services.tracking.run import (
    KnownRun,
    RunInfo,
    TrackedRun,
    check_server,
    default_tracking_uri,
    known_runs,
    logged_steps,
    open_run,
    refusals,
)

__all__ = [
    "Journal",
    "KnownRun",
    "Line",
    "RunInfo",
    "TrackedRun",
    "check_server",
    "default_tracking_uri",
    "known_runs",
    "logged_steps",
    "open_run",
    "refusals",
    "segments",
]
