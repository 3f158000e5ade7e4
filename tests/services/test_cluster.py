"""`make cluster` as its users have it: closed, killed and gone on with, its champion pulled where there is no Ray."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from tests.services.conftest import REPOSITORY, environment, run_job, said, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENT, REFUSED = 3, 6
PORTS = [word for part in ("ray", "dashboard", "mlflow", "s3") for word in (f"--{part}_port", "0")]
TRAIN = ("smoke", "--data", "s3://flam/grid", "--storage", "s3://flam/runs", "--flam_stage.steps", "230")
TRAIN += ("--checkpoint_every", "50", "--experiment", "closed")
CHOOSE = """
import mlflow
client = mlflow.MlflowClient()
newest = client.get_model_version_by_alias("flam-grid", "candidate").version
client.set_registered_model_alias("flam-grid", "champion", newest)
"""
"""What whoever has MLflow's password may do by hand."""
PULL = """
import importlib.util, sys
assert importlib.util.find_spec("ray") is None, "Ray is installed here"
import flam_core, torch
model = flam_core.load("models:/flam-grid@champion")
frames = torch.zeros(1, 4, 48, 48, 3, dtype=torch.uint8)
slots, _ = model.slots(model.encode(frames))
print("pulled", tuple(model.infer_actions(slots).shape), "ray" in sys.modules)
"""


@dataclass(frozen=True)
class Local:
    """A cluster that is up."""

    home: Path
    """The folder it was started in."""
    printed: str

    @property
    def folder(self) -> Path:
        return self.home / ".cluster"

    @property
    def variables(self) -> dict[str, str]:
        """What `source .cluster/env` gives."""
        lines = (self.folder / "env").read_text().splitlines()
        return dict(shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines)

    @property
    def parts(self) -> dict[str, dict[str, object]]:
        return {one["name"]: one for one in json.loads((self.folder / "state.json").read_text())}

    def job(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """A program of flam in the environment that opens the cluster."""
        return run_job(words, environment(**{**self.variables, **changes}), self.home)

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """`ray job submit`, as printed, of a training run."""
        (line,) = re.findall(r"^  (\S+ job submit .*) -- ", self.printed, re.MULTILINE)
        return subprocess.Popen(
            [*shlex.split(line), "--", "python", "jobs/train.py", *TRAIN, *words],
            env=environment(**self.variables),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def venv_without_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """Another environment with `flam[load]`, being installed while other tests run; its folder is `args[-1]`'s."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    code = folder.with_name("code")  # pip would leave a build folder in the checkout
    for name in ("flam_core", "services", "jobs"):
        shutil.copytree(REPOSITORY / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, code)
    pip = f"{folder}/bin/python -m pip install --quiet -c constraints.txt"
    steps = (f"{sys.executable} -m venv {folder}", f"{pip} torch==2.13.0", f"{pip} '{code}[load]'", f"echo {folder}")
    commands = " && ".join(steps)
    log = folder.with_name("log.txt")
    with log.open("wb") as output:
        installing = subprocess.Popen(
            ["bash", "-c", commands], cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    yield installing
    if installing.poll() is None:
        os.killpg(installing.pid, signal.SIGKILL)
        installing.wait()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A cluster with a data set in its bucket."""
    home = tmp_path_factory.mktemp("local")
    done = run_job(["cluster", "up", *PORTS], environment(), home)
    assert done.returncode == 0, said(done)
    up = Local(home, done.stdout)
    try:
        ingest = ("ingest", "--world", "grid", "--size", "48", "--episodes", "40", "--frames", "64")
        made = up.job(*ingest, "--option", "agents=3", "--out", "s3://flam/grid")
        assert made.returncode == 0, said(made)
        yield up
    finally:
        down = run_job(["cluster", "down"], environment(), home)
        assert down.returncode == 0, said(down)


def test_secrets_are_the_owners_alone(local: Local) -> None:
    for name in ("env", "secrets.json", "ray.token", "state.json"):
        assert stat.S_IMODE((local.folder / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(local.folder.stat().st_mode) == 0o700
    printed = local.printed + "".join(file.read_text(errors="replace") for file in (local.folder / "logs").iterdir())
    known = json.loads((local.folder / "secrets.json").read_text())
    assert [name for name, value in known.items() if value in printed] == []


def test_what_is_up_is_left_as_it_is(local: Local) -> None:
    before = local.parts
    again = run_job(["cluster", "up", *PORTS], environment(), local.home)
    assert again.returncode == 0, said(again)
    assert local.parts == before
    assert run_job(["cluster", "status"], environment(), local.home).returncode == 0


def test_nobody_gets_in_without_keys(local: Local) -> None:
    variables = local.variables
    jobs = f"{variables['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    assert requests.get(jobs, timeout=10).status_code == 401
    assert requests.get(jobs, headers={"Authorization": "Bearer " + "0" * 64}, timeout=10).status_code == 403
    experiments = f"{variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(experiments, timeout=10).status_code == 401
    assert requests.get(experiments, auth=("admin", "password1234"), timeout=10).status_code == 401
    address = variables["RAY_API_SERVER_ADDRESS"]
    done = run_job(["submit", "--address", address, "--", "python", "-c", "1"], environment(), local.home)
    assert done.returncode == ENVIRONMENT, said(done)
    assert "asks for a token" in done.stderr


def test_the_doctor_finds_it_well(local: Local) -> None:
    done = local.job("doctor", "--data", "s3://flam/grid", "--storage", "s3://flam/runs", "--security", "--json")
    assert done.returncode == 0, said(done)
    states = {row["check"]: row["state"] for row in json.loads(done.stdout)}
    assert {states[name] for name in ("jobs without the token", "drivers without the token", "the token's file")} == {
        "ok"
    }
    assert states["MLflow without a password"] == "ok"
    assert states["the bucket without keys"] == "note"  # moto believes everybody; only this machine reaches it
    assert len(states) >= 28


@pytest.mark.long
def test_a_job_that_was_killed_goes_on_and_its_champion_is_pulled_elsewhere(
    local: Local, venv_without_ray: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    first = local.submit()
    until(lambda: "committed step" in _said_by_jobs(local), 300)
    (driver,) = _drivers()
    driver.kill()
    before, _ = first.communicate(timeout=120)
    assert first.returncode != 0, before
    second = local.submit()
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output
    assert len(set(re.findall(r"run (smoke-\w+): ", before + output))) == 1
    steps = re.findall(r"committed step (\d+) ", output)
    assert steps[-1] == "250"
    assert "50" not in steps  # that was done by the first
    promoted = local.job("promote", "flam-grid")
    assert promoted.returncode == REFUSED, said(promoted)  # it has learnt nothing in 230 steps, and the gate sees that
    chosen = subprocess.run(
        [sys.executable, "-c", CHOOSE],
        env=environment(**local.variables),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert chosen.returncode == 0, said(chosen)

    assert venv_without_ray.wait(600) == 0
    log = Path(str(venv_without_ray.args[-1]).rpartition("echo ")[2])
    done = subprocess.run(
        [str(log / "bin" / "python"), "-c", PULL],
        env=environment(**local.variables, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, said(done)
    assert "pulled (1, 3, 2, 8) False" in done.stdout


def _said_by_jobs(local: Local) -> str:
    arguments = " ".join(psutil.Process(int(str(local.parts["ray"]["pid"]))).cmdline())
    (files,) = re.findall(r"--temp-dir=(\S+)", arguments)
    logs = Path(files, "session_latest", "logs")
    return "".join(file.read_text(errors="replace") for file in logs.glob("job-driver-*.log"))


def _drivers() -> list[psutil.Process]:
    """The processes of jobs/train.py itself, not of what sent it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[1:2] == ["jobs/train.py"]:
                found.append(process)
    return found


def test_what_has_ended_is_named_and_nothing_else_is_stopped(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        assert run_job(["cluster", "up", *PORTS], environment(), tmp_path).returncode == 0
        up = Local(tmp_path, "")
        pids = {name: psutil.Process(int(str(part["pid"]))) for name, part in up.parts.items()}
        started = [child for process in pids.values() for child in [process, *process.children(recursive=True)]]
        pids["s3"].kill()
        until(lambda: not pids["s3"].is_running() or pids["s3"].status() == psutil.STATUS_ZOMBIE)
        status = run_job(["cluster", "status"], environment(), tmp_path)
        assert status.returncode == ENVIRONMENT, said(status)
        assert "HAS ENDED" in status.stdout
        again = run_job(["cluster", "up", *PORTS], environment(), tmp_path)
        assert again.returncode == ENVIRONMENT, said(again)
        assert "s3 has ended since" in again.stderr
        down = run_job(["cluster", "down"], environment(), tmp_path)
        assert down.returncode == 0, said(down)
        assert "s3 had ended already" in down.stdout
        deadline = time.monotonic() + 30
        while left := [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
        assert bystander.poll() is None
        assert (tmp_path / ".cluster" / "mlflow" / "mlflow.db").exists()
        assert run_job(["cluster", "down"], environment(), tmp_path).stdout.startswith("nothing was started")
    finally:
        bystander.kill()
        bystander.wait()
        run_job(["cluster", "down"], environment(), tmp_path)
