"""What lies outside the cluster: the bucket, MLflow, the data set, and what a job would send."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests

from flam_core.data.manifest import read_manifest
from services.doctor.finding import Finding, attempt, note, ok, red
from services.doctor.node import write_read_delete
from services.storage import endpoint, resolve
from services.submit import check_upload
from services.tracking.probe import write_and_read

AWS = "https://s3.amazonaws.com"
_CLOCK_SECONDS = 60.0
"""S3 refuses requests that are signed a quarter of an hour off."""


def examine_outside(data: str | None, storage: str, tracking: str, working_dir: Path) -> list[Finding]:
    """As seen from here."""
    findings = []
    if data is not None:
        findings.append(attempt("data set", lambda: _data(data)))
    findings.append(attempt("storage: write, read, delete", lambda: _storage(storage)))
    findings.append(attempt("MLflow: write", lambda: ok("MLflow: write", f"{tracking}, {_artifacts(tracking)}")))
    findings += _clock("clock of the bucket", (endpoint() or AWS) if storage.startswith("s3://") else "")
    findings += _clock("clock of MLflow", f"{tracking.rstrip('/')}/health" if tracking.startswith("http") else "")
    findings.append(attempt("size of a job", lambda: _upload(working_dir)))
    return findings


def _data(data: str) -> Finding:
    location = resolve(data)
    manifest = read_manifest(location.fs, location.path)
    return ok("data set", f"{data}: {manifest.name}, {manifest.frames} frames in {len(manifest.shards)} shards")


def _storage(storage: str) -> Finding:
    write_read_delete(storage)
    return ok("storage: write, read, delete", storage)


def _artifacts(tracking: str) -> str:
    return f"artifacts at {write_and_read(tracking)}"


def _upload(folder: Path) -> Finding:
    return ok("size of a job", f"{check_upload(folder):.1f} MiB of {folder.resolve().name}/ would be sent")


def _clock(check: str, url: str) -> list[Finding]:
    """By the answer's Date; nothing where there is no server to ask."""
    if not url:
        return []
    asked = time.time()
    try:
        said = requests.get(url, timeout=10).headers.get("Date")
        there = parsedate_to_datetime(said).timestamp() if said else None
    except (requests.RequestException, ValueError):
        return []  # that it does not answer is said elsewhere
    if there is None:
        return [note(check, f"{url} does not say what time it is")]
    skew = max(asked - 1 - there, there - time.time(), 0.0)  # a Date has whole seconds
    if skew > _CLOCK_SECONDS:
        return [
            red(check, f"off by {skew:.0f} s", "Run an NTP client here and there: signed requests will be refused.")
        ]
    return [ok(check, f"within {skew:.0f} s of this one")]
