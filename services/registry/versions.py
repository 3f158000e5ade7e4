"""Registering a model and getting it back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

from flam_core.errors import DataError, EnvironmentFault
from flam_core.saved_model import CONFIG, WEIGHTS
from services.tracking.server import BATCH, RunInfo, check_server, default_tracking_uri, refusals

_CODE = Path(__file__).with_name("pyfunc_model.py")
_REQUIREMENTS = ("torch", "safetensors", "einops", "numpy", "mlflow")


def register(run: RunInfo, name: str, folder: Path, example: np.ndarray, tags: Mapping[str, str]) -> str:
    """Register the model in `folder` (written by `saved_model.save_model`) as a version of `name`; the version.

    example: uint8 [1, T, H, W, 3], short, since MLflow writes it as JSON; the signature takes any N and T.
    The version gets `tags`, the
    weights' sha256, and the alias `candidate`. Registering the same run's weights again returns the version there is.
    Raises EnvironmentFault if MLflow refuses.
    """
    refused = refusals(
        run.tracking_uri,
        f"did not register {name}",
        fix="Check the server and its artifact store, then run the same command again: training is not repeated.",
    )
    with refused, _tracking_uri(run.tracking_uri):
        return _register(mlflow.MlflowClient(run.tracking_uri), run, name, folder, example, tags)


def _register(
    client: mlflow.MlflowClient, run: RunInfo, name: str, folder: Path, example: np.ndarray, tags: Mapping[str, str]
) -> str:
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'"):
        if known.tags.get("weights_sha256") == digest:
            return str(known.version)
    spec = TensorSpec(np.dtype(np.uint8), (-1, -1, *example.shape[2:]), "frames")
    output = TensorSpec(np.dtype(np.uint8), (-1, -1, *example.shape[2:]))
    params = ParamSchema(
        [
            ParamSpec("mode", "string", "predict"),
            ParamSpec("slot", "long", 0),
            ParamSpec("steps", "long", 10),
            ParamSpec("seed", "long", 0),
        ]
    )
    # MLflow warns that it can make no signature from types; one is given. It insists ("once"), so its warnings are
    # recorded instead of filtered.
    of = client.get_run(run.run_id)
    made = client.create_logged_model(of.info.experiment_id, "model", run.run_id, params=of.data.params)
    with warnings.catch_warnings(record=True):
        info = mlflow.pyfunc.log_model(
            model_id=made.model_id,
            python_model=str(_CODE),
            artifacts={"flam": str(folder)},
            signature=ModelSignature(Schema([spec]), Schema([output]), params),
            input_example={"frames": example},
            pip_requirements=[f"{p}=={importlib.metadata.version(p).split('+')[0]}" for p in _REQUIREMENTS],
            code_paths=[str(Path(__file__).parents[2] / "flam_core")],
        )
    # With a run open, log_model would copy the run's metrics to the model by one request each: some 700, and a server
    # with passwords takes a good part of a second for each.
    client.log_outputs(run.run_id, [LoggedModelOutput(made.model_id, step=0)])
    points = [_of_model(one, made.model_id) for one in of.data._metric_objs if one.step == 0]
    for start in range(0, len(points), BATCH):
        client.log_batch(run.run_id, metrics=points[start : start + BATCH])
    client.set_registered_model_tag(_ensure_model(client, name), "source", "flam")
    version = client.create_model_version(
        name,
        info.model_uri,
        run_id=run.run_id,
        tags={**tags, "weights_sha256": digest, "flam_run": run.name},
        model_id=info.model_id,  # a server refuses a logged model as source without it
    )
    client.set_registered_model_alias(name, "candidate", version.version)
    return str(version.version)


def _of_model(metric: Metric, model: str) -> Metric:
    """The same point of the same run, shown with a model as well."""
    return Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model)


def nominate(tracking_uri: str, name: str, run: str) -> str | None:
    """Give the newest version of the model `name` that the flam run `run` registered the alias `candidate`; its number,
    or None if the run registered none. Raises EnvironmentFault if MLflow refuses."""
    with refusals(tracking_uri, "does not move the alias candidate", fix="Check the server and the credentials."):
        client = mlflow.MlflowClient(tracking_uri)
        known = [one for one in client.search_model_versions(f"name = '{name}'") if one.tags.get("flam_run") == run]
        if not known:
            return None
        newest = max(known, key=lambda one: int(one.version))
        client.set_registered_model_alias(name, "candidate", newest.version)
    return str(newest.version)


@contextmanager
def _tracking_uri(uri: str) -> Iterator[None]:
    """MLflow's fluent calls, which log_model needs, go to a global address."""
    previous = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(previous)


def _ensure_model(client: mlflow.MlflowClient, name: str) -> str:
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description="FLAM: a factored latent action world model.")
    return name


def download(address: str, tracking_uri: str | None = None, into: Path | None = None) -> Path:
    """A local folder with the model that `models:/name/version` or `models:/name@alias` names.

    It lies in `into`; without, in a temporary folder that stays.
    This is what `flam_core.load` calls for `models:/` addresses (entry point `flam.addresses`). The server is
    one given, or `MLFLOW_TRACKING_URI`, else the SQLite file of the current folder. Raises DataError if there is no
    such model or its weights are not those that were registered, EnvironmentFault if MLflow does not answer.
    """
    tracking = tracking_uri or default_tracking_uri(Path(os.environ.get("FLAM_HOME", ".")).absolute())
    check_server(tracking)
    folder = into or Path(tempfile.mkdtemp(prefix="flam-model-"))
    try:
        client = mlflow.MlflowClient(tracking)
        name, version = _parse(client, address)
        source = client.get_model_version_download_uri(name, version)
        meant = client.get_model_version(name, version).tags.get("weights_sha256")
        path = Path(download_artifacts(source, dst_path=str(folder), tracking_uri=tracking))
    except MlflowException as error:
        if re.search(r"error code 40[13]", str(error)):
            raise EnvironmentFault(
                f"MLflow at {tracking} does not let this user read {address}",
                fix="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
            ) from error
        raise DataError(
            f"no model at {address} in MLflow at {tracking}: {str(error).splitlines()[0]}",
            fix="List the versions in MLflow's page, or set MLFLOW_TRACKING_URI.",
        ) from error
    for found in sorted(path.rglob(CONFIG)):
        if (found.parent / WEIGHTS).is_file():
            _check_weights(found.parent, meant, address)
            return found.parent
    raise DataError(f"{address} is not a model of flam: it holds no {WEIGHTS}", fix="Choose a flam-* model.")


def trained_on(address: str, tracking_uri: str | None = None) -> str:
    """Where the data lay that a registered version was trained on; empty if its run does not say.

    Addresses and server as for `download`. Raises DataError if there is no such version, EnvironmentFault if MLflow
    does not answer.
    """
    tracking = tracking_uri or default_tracking_uri(Path(os.environ.get("FLAM_HOME", ".")).absolute())
    check_server(tracking)
    client = mlflow.MlflowClient(tracking)
    try:
        run_id = client.get_model_version(*_parse(client, address)).run_id
        return client.get_run(str(run_id)).data.tags.get("data", "") if run_id else ""
    except MlflowException as error:
        raise DataError(
            f"MLflow at {tracking} does not show the run of {address}: {str(error).splitlines()[0]}",
            fix="List the versions in MLflow's page, or set MLFLOW_TRACKING_URI.",
        ) from error


def _check_weights(folder: Path, meant: str | None, address: str) -> None:
    """By what its config says of them; that they are so, `flam_core.load` looks at."""
    written = json.loads((folder / CONFIG).read_text()).get("weights_sha256")
    if meant is not None and written != meant:
        raise DataError(
            f"the weights of {address} are not those that were registered: their sha256 is {str(written)[:12]}..., the "
            f"version's tag says {meant[:12]}...",
            fix="Somebody replaced the artifact: register the model anew, or roll back.",
        )


def _parse(client: mlflow.MlflowClient, address: str) -> tuple[str, str]:
    name = address.removeprefix("models:/")
    if "@" in name:
        name, _, alias = name.partition("@")
        return name, str(client.get_model_version_by_alias(name, alias).version)
    name, _, version = name.partition("/")
    if not version:
        raise DataError(f"{address} names no version", fix=f"Add one: models:/{name}/1, or models:/{name}@candidate.")
    return name, version
