"""A job sent to a Ray cluster, and followed to its end."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from flam_core.errors import EnvironmentFault, SettingsError, Stopped
from services.submit.upload import UPLOAD_LIMIT_MIB, check_upload

SECRET = re.compile(r"secret|token|password|passwd|credential|access_key", re.IGNORECASE)


@dataclass(frozen=True)
class Submission:
    """A program to run on a cluster."""

    command: tuple[str, ...]
    """Run in a copy of `working_dir` on the head: python, jobs/train.py, …"""
    address: str
    """Of the cluster's dashboard: http://head:8265."""
    working_dir: Path = Path()
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its environment. Whoever may look at jobs sees them."""
    name: str | None = None
    """For `ray job logs` and `ray job stop`; None: Ray makes one up."""
    limit_mib: float = UPLOAD_LIMIT_MIB

    def __post_init__(self) -> None:
        if not self.command:
            raise SettingsError("no program to submit", fix="Name it after --: -- python jobs/train.py …")
        if not re.match(r"https?://", self.address):
            raise SettingsError(
                f"--address {self.address} is not the address of a dashboard", fix="It looks like http://head:8265."
            )
        if secret := [name for name in self.variables if SECRET.search(name)]:
            raise SettingsError(
                f"--env {', '.join(secret)} looks like a secret, and everyone who sees the dashboard would read it",
                fix="Give it to the cluster's nodes: as a mounted secret, or in the environment of `ray start`.",
            )


def submit(job: Submission, *, wait: bool = True) -> int:
    """Send a job; with `wait`, print what it prints until it ends. Its exit code, or 0 without waiting.

    Raises SettingsError for a working directory that is too large, EnvironmentFault if the cluster cannot be reached,
    refuses the token, or cannot run the job.
    """
    size = check_upload(job.working_dir, job.limit_mib)
    logging.getLogger("ray").setLevel(logging.WARNING)  # it would name each ignore file, twice
    client = _client(job.address)
    runtime_env = {"working_dir": str(job.working_dir.resolve()), "env_vars": dict(job.variables)}
    try:
        name = client.submit_job(entrypoint=shlex.join(job.command), submission_id=job.name, runtime_env=runtime_env)
    except (RuntimeError, ValueError, requests.RequestException) as error:
        raise EnvironmentFault(f"the cluster at {job.address} did not take the job: {_said(error)}") from error
    print(f"job {name} at {job.address} ({size:.1f} MiB sent)", flush=True)
    print(f"logs: ray job logs --address {job.address} {name}", flush=True)
    print(f"stop: ray job stop --address {job.address} {name}", flush=True)
    if not wait:
        return 0
    try:
        asyncio.run(_show(client, name))
        info = client.get_job_info(name)
    except KeyboardInterrupt:
        print(f"\njob {name} goes on without being watched", flush=True)
        return 0
    except (RuntimeError, ClientError, requests.RequestException) as error:
        raise EnvironmentFault(
            f"the cluster at {job.address} does not answer any more, while job {name} may go on: {_said(error)}",
            fix=f"Look again: ray job status --address {job.address} {name}",
        ) from error
    print(f"job {name}: {info.status.value.lower()}", flush=True)
    if info.driver_exit_code is not None:
        return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code
    if info.status == JobStatus.STOPPED:
        return Stopped.exit_code
    raise EnvironmentFault(f"job {name} did not run: {_said(info.message or 'no reason given')}")


def _client(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        wrong = "refuses this token" if "failed" in error.message.splitlines()[0] else "asks for a token"
        raise EnvironmentFault(
            f"the Ray cluster at {address} {wrong}",
            fix="export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) with the cluster's token.",
        ) from error
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        raise EnvironmentFault(
            f"no Ray dashboard at {address}: {_said(error)}", fix="Check --address; `ray start --head` prints it."
        ) from error


async def _show(client: JobSubmissionClient, name: str) -> None:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)


def _said(error: object) -> str:
    """In one line: of a server's traceback the last, which has the reason, else the first."""
    lines = [line for line in str(error).splitlines() if len(line) > 1] or [""]
    return lines[-1 if "Traceback" in lines[0] else 0].strip() or type(error).__name__
