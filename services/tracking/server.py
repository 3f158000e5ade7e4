"""Which MLflow server, which run, and what it answers. Nothing here imports MLflow before it is needed: that takes a
second, and each worker would pay for it at each restart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import requests

from flam_core.errors import EnvironmentFault, SettingsError

BATCH = 900
"""Metrics in one call: MLflow takes at most 1,000."""
STEP_METRIC = "progress/step"
PARENT = "mlflow.parentRunId"
"""MLflow's tag of a run that is shown below another."""

# A command line tool of a team's own cluster must not send usage data to third parties.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


@dataclass(frozen=True)
class RunInfo:
    """Which MLflow run; can be sent to other processes."""

    tracking_uri: str
    experiment: str
    run_id: str
    """MLflow's id."""
    name: str
    """flam's id."""
    last_step: int = -1
    """The newest step that MLflow had when the run was opened; -1 if it had none."""


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same under names that MLflow takes: `rollout/psnr_at_1`."""
    return {key.replace("@", "_at_"): value for key, value in metrics.items()}


def unnamed(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same under flam's own names again."""
    return {re.sub(r"_at_(\d+)$", r"@\1", key): value for key, value in metrics.items()}


def default_tracking_uri(home: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file below `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"


@contextmanager
def refusals(
    tracking_uri: str, what: str, *, fix: str = "Bring it back and run the same command again: it resumes."
) -> Iterator[None]:
    """Raises EnvironmentFault, one line, for what MLflow and the network under it raise inside."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(f"MLflow at {tracking_uri} {what}: {reason}", fix=fix) from error


def check_server(tracking_uri: str) -> None:
    """Ask an MLflow server for its health, once and quickly, instead of through MLflow's minutes of retries.

    Raises EnvironmentFault if it does not answer, SettingsError for an address that cannot be one.
    """
    parts = urlparse(tracking_uri)
    if parts.scheme == "sqlite":
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return
    if parts.scheme not in ("http", "https"):
        raise SettingsError(
            f"tracking address {tracking_uri} is not one flam can use",
            fix="Give http(s)://host:port or sqlite:///file.",
        )
    try:
        answer = requests.get(f"{tracking_uri.rstrip('/')}/health", timeout=10)
    except requests.RequestException as error:
        raise EnvironmentFault(
            f"no MLflow server answers at {tracking_uri} ({type(error).__name__})",
            fix="Start it, or correct --tracking or MLFLOW_TRACKING_URI; without either flam uses a local SQLite file.",
        ) from error
    if answer.status_code != 200:
        raise EnvironmentFault(
            f"MLflow at {tracking_uri} answers {answer.status_code}", fix="Check the address and the credentials."
        )


def artifact_folder(tracking_uri: str) -> str | None:
    """Where artifacts go: a server decides for itself; beside an SQLite file lies a folder."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return str(Path(tracking_uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")
