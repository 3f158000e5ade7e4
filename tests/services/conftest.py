"""Real parts for the service tests: Ray head, MLflow server, S3 server, and flam's programs run as users run them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest
import requests

from services.local.parts import free_ports
from tests.conftest import S3_ENVIRONMENT
from tests.services.player_fixture import Played, played

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD_ADDRESS = "127.0.0.2"  # Ray would replace 127.0.0.1 by an outer address
HEAD_CPUS = 4

RESUME_SETTINGS = ("--flam_stage.steps", "230", "--checkpoint_every", "50")
"""250 steps, committed and logged at 50, 100, ..., 250: time enough to be killed in."""
RESUME_STEPS = 250

_FOREIGN = ("RAY_", "MLFLOW_", "AWS_", "FLAM_")
_FOREIGN_NAMES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"}


def environment(**extra: str) -> dict[str, str]:
    """What a user's shell has: nothing of this test session's, but `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and k not in _FOREIGN_NAMES}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **extra,
    }


def run_job(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path, seconds: float = 800
) -> subprocess.CompletedProcess[str]:
    """Run `jobs/<first argument>.py` with the rest in `cwd`, to its end."""
    return subprocess.run(
        _command(arguments), cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=seconds, check=False
    )


def _command(arguments: Sequence[str]) -> list[str]:
    name, *rest = arguments
    return [sys.executable, str(REPOSITORY / "jobs" / f"{name}.py"), *rest]


def said(done: subprocess.CompletedProcess[str]) -> str:
    """All that a program printed, for the message of a failed assertion."""
    return f"exit {done.returncode}\n--- stdout\n{done.stdout[-6000:]}\n--- stderr\n{done.stderr[-6000:]}"


def run_id_of(text: str) -> str:
    """The run id that `jobs/train.py` printed."""
    found = re.search(r"^run (\S+): ", text, re.MULTILINE)
    assert found, text
    return found[1]


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_group(process: subprocess.Popen[str] | subprocess.Popen[bytes], seconds: float = 20) -> None:
    """End a process that leads a group, and all that it started: first politely."""
    started = [process.pid]
    with suppress(psutil.NoSuchProcess):
        started += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for_page(
    url: str, process: subprocess.Popen[bytes], log: Path, seconds: float, token: str | None = None
) -> None:
    """Until `url` answers 200. Raises RuntimeError with the end of `log` if it does not, or if the process ends."""
    deadline, headers = time.monotonic() + seconds, {"Authorization": f"Bearer {token}"} if token else {}
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(requests.RequestException):
            if requests.get(url, headers=headers, timeout=5, proxies={"http": ""}).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"no answer from {url} (pid {process.pid}, exit {process.poll()}):\n{log.read_text()[-3000:]}")


@dataclass(frozen=True)
class RayHead:
    """A running cluster of one node."""

    address: str
    """For `--address`."""
    dashboard: str
    """For `ray job submit --address`."""
    metrics: str
    """What Prometheus reads."""


@contextmanager
def running_head(folder_of_log: Path, **variables: str) -> Iterator[RayHead]:
    """A Ray cluster of one node with 4 logical CPUs. Its processes know the S3 server, as a cluster's nodes would."""
    gcs, dashboard, client, agent, agent_grpc, metrics, runtime_env, objects, node = free_ports(9)
    folder = Path(tempfile.mkdtemp(prefix="flam-ray-", dir="/tmp"))  # short: sockets lie in it
    log = folder_of_log / "log.txt"
    options = {
        "node-ip-address": HEAD_ADDRESS,
        "port": gcs,
        "ray-client-server-port": client,
        "dashboard-host": HEAD_ADDRESS,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
        "runtime-env-agent-port": runtime_env,
        "object-manager-port": objects,
        "node-manager-port": node,
        "num-cpus": HEAD_CPUS,
        "object-store-memory": 500_000_000,
        "temp-dir": folder,
    }
    ray = Path(sys.executable).with_name("ray")
    with log.open("wb") as output:
        head = subprocess.Popen(
            [str(ray), "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
            env=environment(
                **storage_environment(),
                RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
                RAY_ADDRESS=f"{HEAD_ADDRESS}:{gcs}",  # else Ray's own helpers are lost beside another cluster
                **variables,
            ),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:
        url = f"http://{HEAD_ADDRESS}:{dashboard}"
        wait_for_page(f"{url}/api/version", head, log, 120, variables.get("RAY_AUTH_TOKEN"))
        yield RayHead(f"{HEAD_ADDRESS}:{gcs}", url, f"http://{HEAD_ADDRESS}:{metrics}/metrics")
    finally:
        kill_group(head, 5)  # it would wait 30 s for tasks to drain
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_head(s3_server: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """The cluster of most tests."""
    with running_head(tmp_path_factory.mktemp("ray-head")) as head:
        yield head


def storage_environment() -> dict[str, str]:
    """What leads S3 clients to the test run's server."""
    return {**S3_ENVIRONMENT, **{k: os.environ[k] for k in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")}}


@dataclass(frozen=True)
class Tracking:
    """A running MLflow server."""

    uri: str
    artifacts: Path
    """Where it keeps them."""

    @property
    def client(self) -> mlflow.MlflowClient:
        """To look at what flam logged."""
        return mlflow.MlflowClient(self.uri)

    def run(self, run_id: str, experiment: str) -> mlflow.entities.Run:
        """The one MLflow run of a flam run in an experiment."""
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None, f"no experiment {experiment}"
        runs = self.client.search_runs([found.experiment_id], f"tags.`flam.run_id` = '{run_id}'")
        assert len(runs) == 1, f"{len(runs)} MLflow runs of {run_id} in {experiment}"
        return runs[0]

    def history(self, run: mlflow.entities.Run) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every point of every metric, in the order in which MLflow gives them."""
        return {
            key: [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }


@contextmanager
def running_mlflow(
    folder: Path, port: int = 0, *, artifacts: str | None = None, app: str | None = None, **variables: str
) -> Iterator[tuple[Tracking, subprocess.Popen[bytes]]]:
    """An MLflow server on SQLite that keeps everything in `folder` (artifacts elsewhere, if that is given), and its
    process, to be killed. app: such as basic-auth."""
    port = port or free_ports(1)[0]
    log = folder / "log.txt"
    options = {
        "host": "127.0.0.1",
        "port": port,
        "workers": 1,
        "backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "artifacts-destination": artifacts or folder / "artifacts",
        **({"app-name": app} if app else {}),
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())],
            env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_for_page(f"http://127.0.0.1:{port}/health", server, log, 120)
        yield Tracking(f"http://127.0.0.1:{port}", folder / "artifacts"), server
    finally:
        kill_group(server)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    """An MLflow server that outlives the tests."""
    with running_mlflow(tmp_path_factory.mktemp("mlflow")) as (tracking, _):
        yield tracking


GRID = ("--world", "grid", "--size", "48", "--episodes", "40", "--frames", "64", "--option", "agents=3")


@pytest.fixture(scope="session")
def grid_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set `grid` of 40 episodes, made by `jobs/ingest.py`."""
    folder = tmp_path_factory.mktemp("ingest")
    done = run_job(["ingest", *GRID, "--option", "cells=6", "--out", "data/grid"], environment(), folder)
    assert done.returncode == 0, said(done)
    return folder / "data" / "grid"


@dataclass(frozen=True)
class Cluster:
    """Everything a run needs beside its data."""

    head: RayHead
    tracking: Tracking

    def arguments(self, data: Path | str, experiment: str, *rest: str, recipe: str = "smoke") -> list[str]:
        """Of a training run on it."""
        places = ["--data", str(data), "--address", self.head.address, "--tracking", self.tracking.uri]
        return ["train", recipe, *places, "--experiment", experiment, *rest]


@pytest.fixture(scope="session")
def cluster(ray_head: RayHead, mlflow_server: Tracking) -> Cluster:
    """Ray head and MLflow server together."""
    return Cluster(ray_head, mlflow_server)


@dataclass(frozen=True)
class Trained:
    """A run that came to its end."""

    home: Path
    """The folder it was started in."""
    experiment: str
    run_id: str
    arguments: tuple[str, ...]
    done: subprocess.CompletedProcess[str]

    @property
    def outputs(self) -> Path:
        """`outputs/<run id>`, which by default is also where checkpoints are."""
        return self.home / "outputs" / self.run_id

    @property
    def weights(self) -> str:
        """sha256 of the final model's weights."""
        return sha256(self.outputs / "model" / "model.safetensors")

    @property
    def address(self) -> str:
        """`models:/...`, as printed."""
        found = re.search(r"models:/[\w.-]+/\d+", self.done.stdout)
        assert found, said(self.done)
        return found[0]


def train(cluster: Cluster, home: Path, data: Path | str, experiment: str, *rest: str) -> Trained:
    """Train with recipe `smoke`, started in `home`; it must succeed."""
    arguments = cluster.arguments(data, experiment, *rest)
    done = run_job(arguments, environment(), home)
    assert done.returncode == 0, said(done)
    return Trained(home, experiment, run_id_of(done.stdout), tuple(arguments), done)


@pytest.fixture(scope="session")
def smoke_run(cluster: Cluster, grid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Recipe `smoke` as it is, to its end."""
    return train(cluster, tmp_path_factory.mktemp("smoke"), grid_data, "smoke")


@pytest.fixture(scope="session")
def unbroken_run(cluster: Cluster, grid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run that the killed ones are compared with."""
    return train(cluster, tmp_path_factory.mktemp("unbroken"), grid_data, "unbroken", *RESUME_SETTINGS)


def kill_when(
    arguments: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    ready: Callable[[], bool],
    seconds: float = 300,
    *,
    printed: str = "",
) -> str:
    """Start a training run, and once `ready()`, and it has `printed` that, kill -9 its driver and its workers; what it
    printed. (Ray brings what workers print to the driver, after a while.)

    Fails if the run ends before that.
    """
    log = cwd / f"killed-{time.monotonic_ns()}.txt"
    with log.open("wb") as output:
        driver = subprocess.Popen(
            _command(arguments), cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + seconds
    try:
        while not (ready() and printed in log.read_text()):
            assert driver.poll() is None, f"the run ended before it was killed\n{log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"not ready to be killed in {seconds} s\n{log.read_text()[-6000:]}"
            time.sleep(0.05)
    finally:
        workers = {int(pid) for pid in re.findall(r"RayTrainWorker pid=(\d+)", log.read_text())}
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        for pid in workers:
            _kill_worker(pid)
        driver.wait()
    return log.read_text()


def _kill_worker(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(pid)
        if "RayTrainWorker" in " ".join(worker.cmdline()):
            worker.kill()


def until(ready: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for it; fails if it takes longer."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)


def committed(index: Path) -> list[int]:
    """The steps that `checkpoints/index.json` of a local run names."""
    return json.loads(index.read_text())["steps"] if index.exists() else []


@pytest.fixture(scope="session")
def player(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """A player of small models; its tests share it, since it takes half a minute to start."""
    with played(tmp_path_factory.mktemp("player")) as made:
        yield made
