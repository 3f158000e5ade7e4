"""`jobs/submit.py`: what is checked before a job is sent, how it ends, and clusters that ask for a token."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.conftest import REPOSITORY, Cluster, RayHead, Tracking, environment, run_job, running_head, said

pytestmark = pytest.mark.timeout(600)

SETTINGS, ENVIRONMENT, STOPPED = 2, 3, 75
TOKEN = "a" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a program that says what it sees and ends with 75."""
    place = tmp_path / "code"
    place.mkdir()
    (place / "main.py").write_text(
        "import os, sys\nprint('sees', os.environ['COLOUR'], sorted(os.listdir()), sys.argv[1])\nsys.exit(75)\n"
    )
    (place / "large.bin").write_bytes(bytes(3 << 20))
    (place / ".rayignore").write_text("large.bin\n")
    return place


def submit(
    head: RayHead, folder: Path, *words: str, command: tuple[str, ...] = ("python", "main.py", "two words"), **env: str
) -> subprocess.CompletedProcess[str]:
    ours = ["--address", head.dashboard, "--working_dir", str(folder), *words]
    return run_job(["submit", *ours, "--", *command], environment(**env), folder, seconds=200)


def test_a_job_is_shown_to_its_end(ray_head: RayHead, folder: Path) -> None:
    done = submit(ray_head, folder, "--env", "COLOUR=green", "--name", "shown")
    assert done.returncode == STOPPED, said(done)
    assert "sees green ['.rayignore', 'main.py'] two words" in done.stdout
    assert "ray job stop" in done.stdout


def test_a_job_may_be_left_alone(ray_head: RayHead, folder: Path) -> None:
    done = submit(ray_head, folder, "--env", "COLOUR=green", "--name", "alone", "--no_wait")
    assert done.returncode == 0, said(done)
    assert "sees" not in done.stdout
    again = submit(ray_head, folder, "--name", "alone", "--no_wait")
    assert again.returncode == ENVIRONMENT, said(again)
    assert "alone" in again.stderr.splitlines()[-1], said(again)
    assert "already exists" in again.stderr.splitlines()[-1], said(again)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--limit_mib", "0.00001"), SETTINGS, "the largest of 2 files: main.py"),
        (("--env", "AWS_SECRET_ACCESS_KEY=x"), SETTINGS, "AWS_SECRET_ACCESS_KEY looks like a secret"),
        (("--env", "COLOUR"), SETTINGS, "Give NAME=VALUE"),
        (("--address", "head:8265"), SETTINGS, "It looks like http://head:8265"),
        (("--address", "http://127.0.0.1:9"), ENVIRONMENT, "no Ray dashboard at http://127.0.0.1:9"),
        (("--working_dir", "none"), SETTINGS, "none is not a folder"),
    ],
)
def test_what_cannot_be_sent(ray_head: RayHead, folder: Path, words: tuple[str, ...], code: int, message: str) -> None:
    done = submit(ray_head, folder, *words)
    assert done.returncode == code, said(done)
    (line,) = done.stderr.splitlines()
    assert line.startswith("flam: error: ")
    assert message in line


def test_a_program_must_be_named(ray_head: RayHead, folder: Path) -> None:
    done = submit(ray_head, folder, command=())
    assert done.returncode == SETTINGS, said(done)
    assert "no program to submit" in done.stderr


# Clusters that ask for a token


@pytest.fixture(scope="module")
def closed_head(s3_server: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A cluster that takes nobody without its token."""
    with running_head(tmp_path_factory.mktemp("closed"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        yield head


@pytest.fixture
def key(tmp_path: Path) -> dict[str, str]:
    """What its users have in their environment."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "asks for a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}, "refuses this token"),
    ],
    ids=["none", "wrong"],
)
def test_nobody_gets_in_without_the_token(
    closed_head: RayHead, mlflow_server: Tracking, grid_data: Path, folder: Path, env: dict[str, str], message: str
) -> None:
    done = submit(closed_head, folder, **env)
    assert done.returncode == ENVIRONMENT, said(done)
    assert message in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    places = ["--data", str(grid_data), "--address", closed_head.address, "--tracking", mlflow_server.uri]
    driver = run_job(["train", "smoke", *places], environment(**env), folder, seconds=200)
    assert driver.returncode == ENVIRONMENT, said(driver)
    assert "RAY_AUTH_TOKEN_PATH" in driver.stderr


@pytest.mark.slow
def test_a_run_on_a_closed_cluster(
    closed_head: RayHead, mlflow_server: Tracking, grid_data: Path, tmp_path: Path, key: dict[str, str]
) -> None:
    """Submitted as a job, and gone on with by a driver of one's own."""
    cluster = Cluster(closed_head, mlflow_server)
    arguments = cluster.arguments(grid_data, "closed", "--storage", str(tmp_path / "storage"))
    command = (sys.executable, str(REPOSITORY / "jobs" / "train.py"), *arguments[1:])
    code = tmp_path / "code"
    code.mkdir()
    done = submit(closed_head, code, "--env", f"FLAM_HOME={tmp_path}", command=command, **key)
    assert done.returncode == 0, said(done)
    assert "step 50/50" in done.stdout
    again = run_job(arguments, environment(**key), tmp_path)
    assert again.returncode == 0, said(again)
    assert "is trained already" in again.stdout
