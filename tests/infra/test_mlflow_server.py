"""The MLflow server of the manifests, started here by its own command and environment, on a real PostgreSQL."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import requests
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "infra" / "kuberay" / "base"
SECRETS = {"password": "d" * 48, "admin-password": "a" * 48, "session-key": "k" * 64}
AUTH = ("admin", SECRETS["admin-password"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("psycopg2") is None, reason="pip install psycopg2-binary==2.9.13"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def postgresql(folder: Path) -> Iterator[int]:
    """A server with the manifest's user and database; its port. It will not run as root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL (Debian's package postgresql) is not installed")
    data, password = folder / "data", folder / "password"
    folder.mkdir(mode=0o755)
    password.write_text(SECRETS["password"])
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
        shutil.chown(password, user)
    programs = found[-1].parent
    begin = [programs / "initdb", "-D", data, "--username=mlflow", f"--pwfile={password}", "--auth=scram-sha-256"]
    subprocess.run(begin, check=True, capture_output=True, timeout=120, cwd=folder, user=user)
    port = free_port()
    command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user)
    try:
        env = {**os.environ, "PGPASSWORD": SECRETS["password"]}
        make = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        deadline = time.monotonic() + 60
        while subprocess.run(make, env=env, capture_output=True, timeout=60, check=False).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.3)
        yield port
    finally:
        server.terminate()
        server.wait(30)


@dataclass(frozen=True)
class Server:
    """What was started."""

    url: str
    port: int
    bucket: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_server: Callable[[], str]) -> Iterator[Server]:
    """As the pod's container would be, with addresses of this machine."""
    (deployment,) = yaml.safe_load_all((BASE / "mlflow.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    # Not below pytest's folder, which its owner alone may enter: the database has a user of its own.
    folder = (
        Path("/tmp" if os.geteuid() == 0 else tmp_path_factory.mktemp("database")) / f"flam-postgresql-{os.getpid()}"
    )
    bucket = s3_server()
    place = tmp_path_factory.mktemp("mlflow")
    try:
        with postgresql(folder) as database:
            port = free_port()
            environment = _environment(container, database, place)
            words = [_here(word, port, bucket) for word in [*container["command"], *container["args"]]]
            with open(place / "log", "w") as log:
                started = subprocess.Popen(
                    [sys.executable, "-m", *words], env=environment, cwd=place, stdout=log, stderr=subprocess.STDOUT
                )
            try:
                url = f"http://localhost:{port}"  # one of the names that it answers to
                _wait(started, container["readinessProbe"]["httpGet"]["path"], url, place / "log")
                yield Server(url, port, bucket)
            finally:
                started.terminate()
                started.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _here(word: str, port: int, bucket: str) -> str:
    word = word.replace("0.0.0.0", "127.0.0.1").replace("s3://flam/", f"s3://{bucket}/")
    return word.replace(":5000", f":{port}").replace("--port=5000", f"--port={port}")


def _environment(container: dict, database: int, place: Path) -> dict[str, str]:
    """The manifest's, with secrets as they would be made by the README."""
    foreign = ("MLFLOW_", "RAY_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    for one in container["env"]:
        reference = one.get("valueFrom", {}).get("secretKeyRef", {})
        if reference.get("name") == "flam-s3":
            continue  # the S3 server of the tests has its own in the environment
        value = SECRETS[reference["key"]] if reference else one["value"]
        value = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
        found[one["name"]] = value.replace("@postgresql:5432", f"@127.0.0.1:{database}")
    found["MLFLOW_S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    users = place / "basic_auth.ini"
    address = f"postgresql+psycopg2://mlflow:{SECRETS['password']}@127.0.0.1:{database}/mlflow"
    users.write_text(f"[mlflow]\ndefault_permission = READ\nadmin_username = admin\ndatabase_uri = {address}\n")
    return {**found, "MLFLOW_AUTH_CONFIG_PATH": str(users), "HOME": str(place)}


def _wait(started: subprocess.Popen[bytes], path: str, url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            if requests.get(f"{url}{path}", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        assert started.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def test_strangers_are_kept_out(server: Server) -> None:
    asked = f"{server.url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert requests.get(asked, timeout=30).status_code == 401
    assert requests.get(asked, timeout=30, auth=("admin", "wrong")).status_code == 401
    assert requests.get(asked, timeout=30, auth=AUTH).status_code == 200


@pytest.mark.parametrize(("host", "status"), [("mlflow:{port}", 200), ("mlflow", 200), ("evil.example.com", 403)])
def test_it_answers_to_its_name_alone(server: Server, host: str, status: int) -> None:
    asked = f"{server.url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    answer = requests.get(asked, timeout=30, auth=AUTH, headers={"Host": host.format(port=server.port)})
    assert answer.status_code == status


def test_the_probe_is_let_in_by_the_pods_own_address(server: Server) -> None:
    """The kubelet asks for http://POD-ADDRESS:5000/health."""
    assert requests.get(f"{server.url}/health", timeout=30, headers={"Host": "10.1.2.3:5000"}).status_code == 200


def test_the_readme_makes_a_user_for_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who logs runs and registers models, and is no admin."""
    readme = (REPOSITORY / "infra" / "kuberay" / "README.md").read_text()
    (program,) = re.findall(r"^  '(import sys, mlflow\.server\.auth.*)'$", readme, re.MULTILINE)
    password = "p" * 48
    admin = {**os.environ, "MLFLOW_TRACKING_USERNAME": AUTH[0], "MLFLOW_TRACKING_PASSWORD": AUTH[1]}
    command = [sys.executable, "-c", program, server.url]
    subprocess.run(command, input=password, text=True, env=admin, check=True, capture_output=True, timeout=120)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "flam")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    client = mlflow.MlflowClient(server.url)
    run = client.create_run(client.create_experiment("of-flam"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.create_registered_model("flam-of-flam")
    version = client.create_model_version("flam-of-flam", f"runs:/{run.info.run_id}/model", run.info.run_id)
    client.set_registered_model_alias("flam-of-flam", "candidate", version.version)
    more = {"username": "other", "password": password}
    url = f"{server.url}/api/2.0/mlflow/users/create"
    assert requests.post(url, json=more, auth=("flam", password), timeout=30).status_code == 403


def test_runs_and_artifacts_go_through_it(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A client has no key of the bucket, and needs none."""
    import boto3

    objects = boto3.client("s3").list_objects_v2
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", AUTH[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", AUTH[1])
    client = mlflow.MlflowClient(server.url)
    run = client.create_run(client.create_experiment("manifest"))
    client.log_metric(run.info.run_id, "loss", 0.5, step=3)
    client.log_text(run.info.run_id, "kept", "note.txt")
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert str(run.info.artifact_uri).startswith("mlflow-artifacts:")
    assert Path(client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))).read_text() == "kept"
    assert [one["Key"] for one in objects(Bucket=server.bucket)["Contents"] if one["Key"].endswith("note.txt")]
