"""An MLflow run that survives restarts.

The driver opens the run, one trainer process writes its metrics through a `Journal`, the driver closes it. A resumed
run reopens the same MLflow run.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlflow
from mlflow.entities import Metric, Param, RunStatus, RunTag

from flam_core.errors import EnvironmentFault
from services.tracking.server import BATCH, STEP_METRIC, RunInfo, artifact_folder, check_server, named, refusals

_RUN_TAG = "flam.run_id"


def open_run(
    tracking_uri: str, experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> RunInfo:
    """Create the MLflow run of the flam run `name`, or reopen it.

    Raises EnvironmentFault if MLflow does not answer there.
    """
    check_server(tracking_uri)
    with refusals(tracking_uri, "refuses to open the run", fix="Check --tracking or MLFLOW_TRACKING_URI."):
        client = mlflow.MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = (
            found.experiment_id if found else client.create_experiment(experiment, artifact_folder(tracking_uri))
        )
        runs = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{name}'", max_results=1)
        if runs:
            run = runs[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(experiment_id, run_name=name, tags={_RUN_TAG: name})
        run_id = run.info.run_id
        known = run.data.params
        new = [Param(key, value) for key, value in sorted(params.items()) if key not in known]
        client.log_batch(run_id, params=new[:100], tags=[RunTag(k, v) for k, v in sorted(tags.items())])
        for start in range(100, len(new), 100):
            client.log_batch(run_id, params=new[start : start + 100])
        history = client.get_metric_history(run_id, STEP_METRIC) if runs else []
    return RunInfo(tracking_uri, experiment, run_id, name, max((point.step for point in history), default=-1))


@dataclass(frozen=True)
class KnownRun:
    """A run of flam in MLflow."""

    name: str
    """flam's id."""
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED or KILLED."""
    folder: str
    """Where it keeps its checkpoints."""
    started: float
    """Unix time."""
    metrics: Mapping[str, float]
    """The latest of each, by MLflow's names."""


def known_runs(tracking_uri: str, experiment: str, *, at_most: int = 100) -> list[KnownRun]:
    """The runs of an experiment, newest first. Raises EnvironmentFault if MLflow does not answer."""
    check_server(tracking_uri)
    with refusals(tracking_uri, "does not list runs", fix="Check --tracking or MLFLOW_TRACKING_URI."):
        client = mlflow.MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return []
        runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], max_results=at_most)
    return [
        KnownRun(
            run.data.tags[_RUN_TAG],
            run.info.status,
            run.data.tags.get("run_folder", ""),
            run.info.start_time / 1000,
            run.data.metrics,
        )
        for run in runs
        if _RUN_TAG in run.data.tags
    ]


def logged_steps(tracking_uri: str, experiment: str, name: str) -> list[int]:
    """The steps that MLflow has of the flam run `name`, in order, each as often as it has it.

    Raises EnvironmentFault if MLflow does not answer or knows no such run.
    """
    with refusals(tracking_uri, "does not give the run's history"):
        client = mlflow.MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        runs = client.search_runs([found.experiment_id], f"tags.`{_RUN_TAG}` = '{name}'") if found else []
        if len(runs) != 1:
            raise EnvironmentFault(f"MLflow at {tracking_uri} has {len(runs)} runs {name}", fix="There should be one.")
        return sorted(point.step for point in client.get_metric_history(runs[0].info.run_id, STEP_METRIC))


class TrackedRun:
    """Writes to a run that `open_run` gave, once for all: what is logged step by step goes through a `Journal`.

    Every method raises EnvironmentFault if MLflow does not answer or refuses.
    """

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self._client = mlflow.MlflowClient(info.tracking_uri)

    def summary(self, metrics: Mapping[str, float], *, again: bool = False) -> None:
        """Log the final metrics of the run, at step 0, replacing none of the curves; those that are there stay, or with
        `again` get another point."""
        now = int(time.time() * 1000)
        with refusals(self.info.tracking_uri, "does not take metrics"):
            known = self._client.get_run(self.info.run_id).data.metrics
            batch = [Metric(key, value, now, 0) for key, value in named(metrics).items() if again or key not in known]
            for start in range(0, len(batch), BATCH):
                self._client.log_batch(self.info.run_id, metrics=batch[start : start + BATCH])

    def artifacts(self, folder: Path, path: str, *, leave_out: Collection[str] = ()) -> None:
        """Upload the files of a folder, but those that `leave_out` names, as artifacts below `path`."""
        with refusals(self.info.tracking_uri, "does not take artifacts"):
            for entry in sorted(folder.iterdir()):
                if entry.name in leave_out:
                    continue
                if entry.is_dir():
                    self._client.log_artifacts(self.info.run_id, str(entry), f"{path}/{entry.name}")
                else:
                    self._client.log_artifact(self.info.run_id, str(entry), path)

    def text(self, content: str, path: str) -> None:
        """Upload a text as the artifact `path`."""
        with refusals(self.info.tracking_uri, "does not take artifacts"):
            self._client.log_text(self.info.run_id, content, path)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        with refusals(self.info.tracking_uri, "does not take tags"):
            self._client.log_batch(self.info.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the run truly."""
        with refusals(self.info.tracking_uri, "does not end the run"):
            self._client.set_terminated(self.info.run_id, RunStatus.to_string(RunStatus.from_string(status)))
