"""Tracking: one MLflow run per logical flam run, reopened on resume, with no step logged twice."""

from services.tracking.journal import Journal, Line, segments
from services.tracking.run import RunInfo, TrackedRun, check_server, default_tracking_uri, open_run, refusals

__all__ = [
    "Journal",
    "Line",
    "RunInfo",
    "TrackedRun",
    "check_server",
    "default_tracking_uri",
    "open_run",
    "refusals",
    "segments",
]
