"""Whether an MLflow takes what a run gives it."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import mlflow

from flam_core.errors import EnvironmentFault
from services.tracking.server import artifact_folder, check_server, refusals

EXPERIMENT = "flam-doctor"


def write_and_read(tracking_uri: str) -> str:
    """A run with a metric and an artifact, read back and deleted; where artifacts go.

    Raises EnvironmentFault for what MLflow refuses, does not give back, or gives back otherwise.
    """
    check_server(tracking_uri)
    fix = "Check the server, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    with refusals(tracking_uri, "does not take a run", fix=fix):
        client = mlflow.MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = (
            found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_folder(tracking_uri))
        )
        run = client.create_run(experiment, run_name="doctor")
        client.log_metric(run.info.run_id, "alive", 1.0, step=0)
        if client.get_run(run.info.run_id).data.metrics.get("alive") != 1.0:
            raise EnvironmentFault(f"MLflow at {tracking_uri} does not give back a metric it took", fix="See its log.")
    word = uuid.uuid4().hex
    fix = "Start the server with --artifacts-destination, or make that place writable from here."
    with refusals(tracking_uri, f"does not keep artifacts at {run.info.artifact_uri}", fix=fix):
        client.log_text(run.info.run_id, word, "doctor.txt")
        with tempfile.TemporaryDirectory() as folder:
            back = Path(client.download_artifacts(run.info.run_id, "doctor.txt", folder)).read_text()
    if back != word:
        raise EnvironmentFault(f"{run.info.artifact_uri} gives other bytes than were written", fix="See its log.")
    with refusals(tracking_uri, "does not delete a run", fix="Let this user edit the experiment."):
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    return str(run.info.artifact_uri).rsplit("/", 2)[0]
