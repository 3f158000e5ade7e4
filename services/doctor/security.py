"""Whether what should be closed is closed: tried from outside, without keys."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlparse

import ray
import requests
from botocore.exceptions import BotoCoreError, ClientError
from packaging.version import Version
from ray.job_submission import JobSubmissionClient

from flam_core.errors import FlamError
from services.doctor.finding import Finding, last_line, note, ok, red
from services.doctor.node import delete
from services.doctor.outside import AWS
from services.player.token import is_loopback
from services.storage import Location, endpoint, exists, resolve, write_bytes
from services.storage.faults import bucket_of
from services.submit.job import SECRET

_SAFE_RAY = Version("2.54")
"""CVE-2025-62593 (a page in a browser can submit jobs) is closed from there on; CVE-2023-48022 by a token."""
_TOKEN_FIX = (
    "Start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, the same on all nodes: whoever reaches the job API "
    "runs programs on the cluster."
)
_DRIVER = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print('taken')"
_OTHERS = 0o077
_REFUSED = (401, 403)
_PUBLIC = "Take away public access: checkpoints are loaded from it."


def examine_security(address: str | None, dashboard: str, storage: str, tracking: str) -> list[Finding]:
    """address: of the cluster; None for a local Ray of this program's own."""
    findings = [_version()]
    if address is None:
        findings.append(
            note("token", "a Ray of this program's own, on this machine alone", "Look at a cluster: --address.")
        )
    else:
        findings += [_jobs_closed(dashboard), _drivers_closed(address), _token_file(), _secrets_in_jobs(dashboard)]
    findings += [_mlflow_closed(tracking), _bucket_closed(storage), _pickle()]
    findings += [_plain(name, url) for name, url in _passwords_sent(dashboard, storage, tracking).items()]
    return findings


def _version() -> Finding:
    if Version(ray.__version__) < _SAFE_RAY:
        return red("Ray's version", f"{ray.__version__} has known holes", f"Use {_SAFE_RAY} or newer.")
    return ok("Ray's version", ray.__version__)


def _status(url: str, **headers: str) -> int:
    """Of a request with no keys but `headers`; 0 if nothing answers."""
    try:
        return requests.get(url, headers=headers, timeout=10).status_code
    except requests.RequestException:
        return 0


def _jobs_closed(dashboard: str) -> Finding:
    check, url = "jobs without the token", f"{dashboard}/api/jobs/"
    without, wrong = _status(url), _status(url, Authorization="Bearer " + "0" * 64)
    if 0 in (without, wrong):
        return red(check, f"no dashboard answers at {dashboard}", "Give --dashboard.")
    if without == 401 and wrong == 403:
        return ok(check, "refused (401 without a token, 403 with a wrong one)")
    return red(check, f"{url} answers {without} without a token and {wrong} with a wrong one", _TOKEN_FIX)


def _drivers_closed(address: str) -> Finding:
    check = "drivers without the token"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, address],
            env={**bare, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=90,
        )
    except subprocess.TimeoutExpired:
        return note(check, "neither taken nor refused in 90 s")
    if "taken" in done.stdout:
        return red(check, f"a program without a token joined {address}", _TOKEN_FIX)
    if "uthentication" in done.stderr or "token" in done.stderr.lower():
        return ok(check, "refused")
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return red(check, f"not taken, but not for want of a token: {' '.join(last)}", "Check --address.")


def _token_file() -> Finding:
    check, place = "the token's file", os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return note(check, "no token is used from here (RAY_AUTH_MODE=disabled)", "export RAY_AUTH_MODE=token")
    if place is None:
        default = Path.home() / ".ray" / "auth_token"
        if not default.exists():
            return note(
                check, "none: the token is in the environment", "A file that RAY_AUTH_TOKEN_PATH names is safer."
            )
        place = str(default)
    mode = Path(place).stat().st_mode & 0o777
    if mode & _OTHERS:
        return red(check, f"{place} has mode {mode:04o}", f"chmod 600 {place}")
    return ok(check, f"{place} ({mode:04o})")


def _secrets_in_jobs(dashboard: str) -> Finding:
    check = "secrets in jobs"
    try:
        jobs = JobSubmissionClient(dashboard).list_jobs()
    except Exception as error:  # noqa: BLE001 - of many kinds, some private to Ray; all mean the same here
        return note(check, f"the jobs cannot be listed: {last_line(error)}")
    found = [
        f"{job.submission_id}: {name}"
        for job in jobs
        for name in (job.runtime_env or {}).get("env_vars", {})
        if SECRET.search(name)
    ]
    if found:
        return red(
            check, ", ".join(found), "Everyone who sees the dashboard reads them: change them, and mount secrets."
        )
    return ok(check, f"none in the environments of {len(jobs)} jobs")


def _mlflow_closed(tracking: str) -> Finding:
    check = "MLflow without a password"
    if not tracking.startswith("http"):
        return note(check, f"{tracking.split(':')[0]} file: closed to those who cannot read or write it")
    status = _status(f"{tracking.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
    if status == 0:
        return red(check, f"no MLflow server answers at {tracking}", "Start it, or correct --tracking.")
    if status in _REFUSED:
        return ok(check, f"refused ({status})")
    fix = "Start it with --app-name basic-auth: whoever writes there chooses the champion."
    return _open(check, tracking, f"{tracking} answers {status}", fix)


def _bucket_closed(storage: str) -> Finding:
    check = "the bucket without keys"
    if not storage.startswith("s3://"):
        return note(check, "a folder: closed to those who cannot read or write it")
    store = _store_of(bucket_of(storage))
    answers = {"LIST": _status(f"{store}/{bucket_of(storage)}?list-type=2&max-keys=1")}
    if answers["LIST"] == 0:
        return red(check, f"no store answers at {store}", "Is it up? Check AWS_ENDPOINT_URL and the network.")
    left = ""
    try:
        place = resolve(storage) / f".doctor-{uuid.uuid4().hex}"
        answers["GET"] = _read_without_keys(store, place)
    except FlamError as error:
        return red(check, f"with keys it is not usable either: {error.what}", error.fix)
    answers["PUT"] = _written_without_keys(store, place)
    with suppress(FlamError):
        left = f"; {place} could not be deleted" if exists(place) else ""
    said = ", ".join(f"{request} {status}" for request, status in answers.items())
    if left:
        return red(check, f"{store} answers {said}{left}", f"Delete {place}. {_PUBLIC}")
    if all(status in _REFUSED for status in answers.values()):
        return ok(check, f"refused ({said})")
    if any(200 <= status < 300 for status in answers.values()):
        return _open(check, store, f"{store} answers {said}", _PUBLIC)
    return red(check, f"{store} neither lets in nor refuses: {said}", "Check the bucket's name and AWS_ENDPOINT_URL.")


def _store_of(bucket: str) -> str:
    """The address at which AWS has the bucket: another region's store knows it and answers neither yes nor no."""
    store = (endpoint() or AWS).rstrip("/")
    if not (urlparse(store).hostname or "").endswith("amazonaws.com"):
        return store
    with suppress(requests.RequestException):
        region = requests.head(f"{store}/{bucket}", timeout=10).headers.get("x-amz-bucket-region")
        return f"https://s3.{region}.amazonaws.com" if region else store
    return store


def _read_without_keys(store: str, place: Location) -> int:
    """The answer to whoever knows an object's name: one is written with keys for that, and deleted."""
    write_bytes(place, b"doctor")
    try:
        return _status(f"{store}/{quote(place.path)}")
    finally:
        _delete(store, place)


def _written_without_keys(store: str, place: Location) -> int:
    """The answer to whoever writes; what the store took is deleted."""
    try:
        return requests.put(f"{store}/{quote(place.path)}", data=b"doctor", timeout=10).status_code
    except requests.RequestException:
        return 0
    finally:
        _delete(store, place)


def _delete(store: str, place: Location) -> None:
    """With keys; where these may not, as a stranger. Whether it is gone is for the caller to see."""
    with suppress(FlamError, OSError, BotoCoreError, ClientError):
        if exists(place):
            delete(place)
    with suppress(FlamError, requests.RequestException):
        if exists(place):
            requests.delete(f"{store}/{quote(place.path)}", timeout=10)


def _pickle() -> Finding:
    check = "pickled models"
    if os.environ.get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "").lower() == "false":
        return ok(check, "MLflow loads none")
    return note(
        check,
        "MLflow may load them, and they run code",
        "export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false: flam's models are data and need none.",
    )


def _passwords_sent(dashboard: str, storage: str, tracking: str) -> dict[str, str]:
    sent = {"token on its way": dashboard, "password on its way": tracking}
    if storage.startswith("s3://") and endpoint():
        sent["data on its way"] = endpoint()
    return {name: url for name, url in sent.items() if url.startswith("http")}


def _plain(check: str, url: str) -> Finding:
    parts = urlparse(url)
    if parts.scheme == "https" or is_loopback(parts.hostname or ""):
        return ok(check, url)
    return note(
        check, f"{url} is not encrypted", "Use https, or a network that only the cluster is on (docs/security.md)."
    )


def _open(check: str, url: str, seen: str, fix: str) -> Finding:
    """What is open: bad, unless only this machine can reach it."""
    if is_loopback(urlparse(url).hostname or ""):
        return note(check, f"{seen}; only this machine can reach it", fix)
    return red(check, seen, fix)
