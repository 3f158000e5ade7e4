"""All checks, in the order in which one thing needs another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.worker import get_dashboard_url  # of a cluster that was joined: not public

from flam_core.errors import FlamError
from services.doctor.finding import Finding, attempt, ok, red
from services.doctor.nodes import examine_collective, examine_gpus, examine_nodes, examine_room
from services.doctor.outside import examine_outside
from services.doctor.security import examine_security
from services.tracking.server import default_tracking_uri
from services.training.cluster import connect
from services.training.prepare import at_home, home
from services.training.settings import TrainSettings


@dataclass(frozen=True)
class DoctorSettings:
    """What to look at: the same places that a run would be given."""

    address: str | None = None
    """Ray cluster; default RAY_ADDRESS, else a local Ray is started, looked at and stopped."""
    dashboard: str | None = None
    """Of the cluster, for jobs; default RAY_API_SERVER_ADDRESS, else what the cluster says."""
    data: str | None = None
    """A data set to look for."""
    storage: str = "outputs"
    """Where runs keep checkpoints: a folder or s3://bucket/prefix."""
    tracking: str | None = None
    """MLflow's address; default MLFLOW_TRACKING_URI, else an SQLite file beside the outputs."""
    workers: str = "1"
    """Of the run that is planned."""
    worker_cpus: float = 1.0
    """Of each."""
    gpu: bool = False
    """One GPU for each worker."""
    working_dir: Path = Path()
    """What `ray job submit` would send."""
    security: bool = False
    """Also look at who is let in without a key."""


def examine(settings: DoctorSettings) -> list[Finding]:
    """Look at everything. What cannot be reached is a red finding, not an error.

    Raises SettingsError for settings that no run takes.
    """
    plan = TrainSettings(
        address=settings.address, workers=settings.workers, worker_cpus=settings.worker_cpus, gpu=settings.gpu
    )
    storage = str(at_home(settings.storage))
    tracking = settings.tracking or default_tracking_uri(home())
    data = None if settings.data is None else str(at_home(settings.data))
    findings = []
    address = settings.address or os.environ.get("RAY_ADDRESS")
    dashboard = settings.dashboard or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    try:
        connect(plan)
    except FlamError as error:
        findings.append(red("Ray", error.what, error.fix))
    else:
        try:
            dashboard = dashboard or f"http://{get_dashboard_url()}"
            findings.append(ok("Ray", f"{ray.__version__} at {address or 'this machine'}, dashboard {dashboard}"))
            findings += examine_nodes(storage, tracking)
            findings += [examine_room(plan), examine_gpus(settings.gpu)]
            findings.append(attempt("all-reduce", examine_collective))
        finally:
            ray.shutdown()
    findings += examine_outside(data, storage, tracking, settings.working_dir)
    if settings.security:
        findings += examine_security(address, dashboard.rstrip("/"), storage, tracking)
    return findings
