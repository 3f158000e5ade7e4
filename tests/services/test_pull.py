"""Registered models pulled by other processes, with nothing cached: from a server with passwords that keeps its
artifacts in a bucket, from an SQLite file, from a plain folder without MLflow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from flam_core.model import Flam
from flam_core.recipes import get_recipe
from flam_core.saved_model import WEIGHTS, save_model
from services.registry import register
from services.tracking.run import open_run
from tests.services.conftest import REPOSITORY, environment, running_mlflow, said, sha256, storage_environment

pytestmark = pytest.mark.slow

USER, PASSWORD = "admin", "correct-horse-battery"
NAME = "flam-pull"
ENVIRONMENT_FAULT, DATA = 3, 4

LOAD = """
import sys
import flam_core
from flam_core.errors import FlamError
from flam_core.saved_model import weights_to_bytes
import hashlib
try:
    print(hashlib.sha256(weights_to_bytes(flam_core.load(sys.argv[1]))).hexdigest())
except FlamError as error:
    print(error)
    sys.exit(error.exit_code)
"""

WITHOUT_MLFLOW = (
    """
import sys
sys.modules["mlflow"] = None
"""
    + LOAD
)

PYFUNC = """
import sys
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
frames = np.random.default_rng(0).integers(0, 256, (2, 4, 48, 48, 3), dtype=np.uint8)
import flam_core
print("code", flam_core.__file__)
plain = model.predict(frames)
print("predict", plain.dtype, plain.shape)
actions = model.predict(frames, params={"mode": "infer"})
print("infer", actions.dtype, actions.shape)
one, again, other = (model.predict(frames, params={"mode": "edit", "slot": 1, "seed": s}) for s in (7, 7, 8))
print("edit", one.dtype, one.shape, (one == again).all())
free = model.predict(frames, params={"mode": "free", "steps": 6, "seed": 3})
print("free", free.dtype, free.shape)
for params in ({"mode": "dance"}, {"mode": "edit", "slot": 9}):
    try:
        model.predict(frames, params=params)
    except Exception as error:
        print("refused", error)
print("example", model.input_example["frames"].shape if model.input_example is not None else None)
"""


@dataclass(frozen=True)
class Shelf:
    """A registered model, and what it takes to read it."""

    address: str
    variables: dict[str, str]
    digest: str

    def run(self, code: str, home: Path, address: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own, whose home and caches are empty."""
        env = environment(
            **{
                **storage_environment(),
                **self.variables,
                "HOME": str(home),
                "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                **more,
            }
        )
        return subprocess.run(
            [sys.executable, "-c", code, address or self.address],
            env=env,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=250,
        )


def model() -> Flam:
    torch.manual_seed(0)
    config = get_recipe("smoke")
    return Flam(config.tokenizer, config.model).eval()


def registered(uri: str, folder: Path) -> str:
    """The address of a version, and of its alias."""
    save_model(model(), folder, "# A model\n")
    info = open_run(uri, "pull", "pull-1", {}, {})
    version = register(info, NAME, folder, np.zeros((1, 2, 48, 48, 3), dtype=np.uint8), {})
    return f"models:/{NAME}/{version}"


@pytest.fixture(scope="module")
def closed(s3_server: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """On a server that asks for a password and keeps artifacts in a bucket."""
    folder = tmp_path_factory.mktemp("closed")
    place = f"s3://{s3_server()}/mlflow"
    secrets = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only for tests",
        **storage_environment(),
    }
    with running_mlflow(folder, artifacts=place, app="basic-auth", **secrets) as (tracking, _):
        variables = {
            "MLFLOW_TRACKING_URI": tracking.uri,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            address = registered(tracking.uri, folder / "model")
        yield Shelf(address, variables, sha256(folder / "model" / WEIGHTS))


def test_a_server_with_passwords_and_a_bucket_gives_the_model(closed: Shelf, tmp_path: Path) -> None:
    done = closed.run(LOAD, tmp_path)
    assert done.returncode == 0, said(done)
    assert done.stdout.split()[-1] == closed.digest
    by_alias = closed.run(LOAD, tmp_path, f"models:/{NAME}@candidate")
    assert by_alias.stdout.split()[-1] == closed.digest, said(by_alias)


@pytest.mark.parametrize("password", ["wrong", ""])
def test_without_the_password_it_is_refused_in_a_line(closed: Shelf, tmp_path: Path, password: str) -> None:
    done = closed.run(LOAD, tmp_path, MLFLOW_TRACKING_PASSWORD=password)
    assert done.returncode == ENVIRONMENT_FAULT, said(done)
    assert "does not let this user read" in done.stdout
    assert "MLFLOW_TRACKING_USERNAME" in done.stdout


def test_any_mlflow_client_infers_edits_and_imagines(closed: Shelf, tmp_path: Path) -> None:
    done = closed.run(PYFUNC, tmp_path)
    assert done.returncode == 0, said(done)
    config = get_recipe("smoke").model
    lines = done.stdout.splitlines()
    (code,) = [line for line in lines if line.startswith("code ")]
    assert str(REPOSITORY) not in code  # it is the version's own
    assert "predict uint8 (2, 3, 48, 48, 3)" in lines
    assert f"infer float32 (2, 3, {config.factors}, {config.action_dim})" in lines
    assert "edit uint8 (2, 3, 48, 48, 3) True" in lines
    assert "free uint8 (2, 6, 48, 48, 3)" in lines
    refused = [line for line in lines if line.startswith("refused")]
    assert len(refused) == 2
    assert "predict, infer, edit, free" in refused[0]
    assert "slots 0 to 1" in refused[1]
    assert "example (1, 2, 48, 48, 3)" in lines


def test_an_sqlite_file_gives_the_model(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shelf = Shelf(
        registered(uri, tmp_path / "model"), {"MLFLOW_TRACKING_URI": uri}, sha256(tmp_path / "model" / WEIGHTS)
    )
    (tmp_path / "home").mkdir()
    done = shelf.run(LOAD, tmp_path / "home")
    assert done.returncode == 0, said(done)
    assert done.stdout.split()[-1] == shelf.digest


def test_a_plain_folder_needs_no_mlflow(tmp_path: Path) -> None:
    save_model(model(), tmp_path / "model", "# A model\n")
    shelf = Shelf(str(tmp_path / "model"), {}, sha256(tmp_path / "model" / WEIGHTS))
    done = shelf.run(WITHOUT_MLFLOW, tmp_path)
    assert done.returncode == 0, said(done)
    assert done.stdout.split()[-1] == shelf.digest


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_model(model(), tmp_path / "model", "# A model\n")
    (tmp_path / "model" / WEIGHTS).unlink()
    done = Shelf(str(tmp_path / "model"), {}, "").run(LOAD, tmp_path)
    assert done.returncode == DATA, said(done)
    assert f"{WEIGHTS} is missing" in done.stdout
