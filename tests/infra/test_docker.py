"""The Dockerfile keeps its rules, and its own pip steps give an environment in which the jobs start."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra.dockerfile import instructions, lint

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "infra" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_dockerfile_keeps_the_rules() -> None:
    assert lint(TEXT) == []


GOOD = f"FROM python:3.11@sha256:{'a' * 64} AS flam\n"
USER = "USER 10001\n"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("FROM python:3.11 AS flam\n" + USER, "from"),
        ("FROM python AS flam\n" + USER, "from"),
        (f"FROM python@sha256:{'a' * 64} AS flam\n" + USER, "from"),
        ("ARG BASE=python:3.11\nFROM ${BASE} AS flam\n" + USER, "from"),
        ("FROM python:3.11@${DIGEST} AS flam\n" + USER, "from"),
        ("ARG DIGEST=latest\nFROM python:3.11@${DIGEST} AS flam\n" + USER, "from"),
        (GOOD, "user"),
        (GOOD + "USER root\n", "user"),
        (GOOD + USER + "USER 0:0\n", "user"),
        (GOOD + "USER flam\n", "user"),
        (GOOD + f"{USER}FROM flam AS other\nUSER root\n", "user"),
        (GOOD + "ADD https://example.com/weights.tar /\n" + USER, "add"),
        (GOOD + "ADD weights.tar /\n" + USER, "add"),
        (GOOD + "ARG S3_SECRET\n" + USER, "secret"),
        (GOOD + "ENV A=1 MLFLOW_TRACKING_PASSWORD=x\n" + USER, "secret"),
        (GOOD + "RUN apt-get update && apt-get install -y git\n" + USER, "apt"),
        (GOOD + "RUN pip install \\\n  -c constraints.txt torch\n" + USER, "pip"),
        (GOOD + "RUN pip install --no-cache-dir torch\n" + USER, "pip"),
        (GOOD + "RUN curl -O https://example.com/x\n" + USER, "fetch"),
    ],
)
def test_lint_finds(text: str, rule: str) -> None:
    assert [each.partition(":")[0] for each in lint(text)] == [rule]


def test_lint_takes_what_is_right() -> None:
    apt = "RUN apt-get update && apt-get install -y git && rm -rf /var/lib/apt/lists/*\n"
    assert lint(GOOD + apt + USER) == []
    assert (
        lint(
            f"ARG D\nFROM python:3.11@${{D}} AS build\nFROM python:3.11@${{D}} AS flam\nCOPY --from=build /a /a\n{USER}"
        )
        == []
    )


def test_each_image_has_a_list_of_what_is_in_it() -> None:
    for name in ("flam", "mlflow"):
        assert f"--output-file /opt/{name}/sbom.json /opt/{name}/bin/python" in TEXT
        assert f"COPY --from=build-{name} /opt/{name} /opt/{name}" in TEXT


def test_user_is_the_one_of_the_manifests() -> None:
    users = {one.rest for one in instructions(TEXT) if one.word == "USER"}
    assert users == {"10001:10001"}
    (whole,) = yaml.safe_load_all((REPOSITORY / "infra/kuberay/base/ray.yaml").read_text())
    pod = whole["items"][0]["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" in users


def test_the_gpu_image_can_compile() -> None:
    """Triton needs a C compiler where torch.compile runs, which slim images lack."""
    stage = TEXT[TEXT.rindex("\nFROM ") :]
    assert " AS flam\n" in stage
    (step,) = [one.rest for one in instructions(stage) if one.word == "RUN" and "apt-get install" in one.rest]
    assert re.search(r" gcc libc6-dev\b", step)
    assert step.startswith('if [ "$ACCELERATOR" != cpu ]; then ')
    assert stage.index("ARG ACCELERATOR") < stage.index("apt-get install") < stage.index("USER ")


def test_mlflow_is_pinned() -> None:
    known = pins()
    for line in (DOCKER / "mlflow.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            wanted = Requirement(line)
            exact = [one.operator for one in wanted.specifier] == ["=="]
            assert exact or canonicalize_name(wanted.name) in known, f"{line} has no pin"


def test_only_what_is_copied_is_sent() -> None:
    """.dockerignore lets through what COPY names, and no file that may hold data or secrets."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    through = [line[1:] for line in rules if line.startswith("!")]

    def sent(path: str) -> bool:
        return any(fnmatch.fnmatch(path, rule) or path.startswith(f"{rule}/") for rule in through)

    copied = [one.rest.split()[:-1] for one in instructions(TEXT) if one.word == "COPY" and "--from" not in one.rest]
    assert copied
    for path in (each for paths in copied for each in paths):
        assert (REPOSITORY / path).exists()
        assert sent(path), path
    for path in (
        ".cluster/ray.token",
        ".git/config",
        "data/grid/manifest.json",
        "outputs/latest",
        ".venv/bin/python",
        ".env",
    ):
        assert not sent(path), path


def pip_steps(environment: str) -> list[list[str]]:
    """The Dockerfile's own `pip install` of an environment, as words after pip."""
    found = [
        one.rest.removeprefix(f"/opt/{environment}/bin/pip ")
        for one in instructions(TEXT)
        if one.word == "RUN" and one.rest.startswith(f"/opt/{environment}/bin/pip install")
    ]
    assert found
    plain = [re.sub(r"\$\{TORCH_INDEX:\+[^}]*\} ?", "", step) for step in found]
    assert not any("$" in step for step in plain)
    return [step.replace("'", "").split() for step in plain]


def _environment(folder: Path, name: str) -> Path:
    """What the Dockerfile installs, in a clean environment beside a copy of what it copies."""
    for entry in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "flam_core", "services", "jobs"):
        source = REPOSITORY / entry
        if source.is_dir():
            shutil.copytree(source, folder / entry, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / entry)
    for path in DOCKER.glob("*.txt"):
        shutil.copy(path, folder)
    subprocess.run([sys.executable, "-m", "venv", folder / name], check=True, timeout=120)
    for step in pip_steps(name):
        pip = [folder / name / "bin" / "pip", *step, "--quiet"]
        done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stderr
    return folder / name / "bin" / "python"


def _installed(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import distributions; "
        "print(json.dumps({one.metadata['Name']: one.version for one in distributions()}))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return {canonicalize_name(name): version.split("+")[0] for name, version in json.loads(done.stdout).items()}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_pip_steps_give_an_environment_in_which_jobs_start(tmp_path: Path) -> None:
    python = _environment(tmp_path, "flam")
    known = pins()
    odd = {name: version for name, version in _installed(python).items() if known.get(name) != version}
    assert set(odd) <= {"pip", "setuptools", "wheel", "flam"} | {
        name for name in odd if "nvidia" in name or name == "triton"
    }
    assert {"pytest", "moto", "playwright"}.isdisjoint(_installed(python))
    _bill(tmp_path, python)
    shutil.rmtree(tmp_path / "services")  # in the image only jobs/ lies beside the environment
    shutil.rmtree(tmp_path / "flam_core")
    (command,) = [one.rest for one in instructions(TEXT) if one.word == "CMD" and "train.py" in one.rest]
    words = [str(python), *(word.replace("/app/", f"{tmp_path}/") for word in json.loads(command)[1:])]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "--storage" in done.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_pip_steps_of_mlflow_give_a_server(tmp_path: Path) -> None:
    python = _environment(tmp_path, "mlflow")
    known = pins()
    odd = {name for name, version in _installed(python).items() if known.get(name) != version}
    assert odd <= {"pip", "setuptools", "wheel", "psycopg2-binary"}, "neither constraints.txt nor mlflow.txt pins it"
    assert {"ray", "torch"}.isdisjoint(_installed(python))
    code = "import boto3, flask_wtf, mlflow.server.auth.config, psycopg2"
    subprocess.run([python, "-c", code], cwd=tmp_path / "jobs", check=True, timeout=300)
    (command,) = [one.rest for one in instructions(TEXT) if one.word == "CMD" and "mlflow" in one.rest]
    words = [str(python.with_name("mlflow")), *json.loads(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    flags = set(re.findall(r"--[a-z-]+", done.stdout))
    (server,) = yaml.safe_load_all((REPOSITORY / "infra/kuberay/base/mlflow.yaml").read_text())
    used = {word.partition("=")[0] for word in server["spec"]["template"]["spec"]["containers"][0]["args"]}
    assert used <= flags, "the manifest gives the server a flag that it does not know"


def _bill(folder: Path, python: Path) -> None:
    """The Dockerfile's own list of what is installed names it all."""
    subprocess.run([sys.executable, "-m", "venv", folder / "sbom"], check=True, timeout=120)
    pip = [folder / "sbom" / "bin" / "pip", "install", "--quiet", "-r", DOCKER / "sbom.txt"]
    subprocess.run(pip, check=True, capture_output=True, timeout=600)
    (step,) = [one.rest for one in instructions(TEXT) if one.word == "RUN" and "/opt/flam/sbom.json" in one.rest]
    words = step.replace("/opt/sbom/", f"{folder}/sbom/").replace("/opt/flam/", f"{folder}/flam/").split()
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    bill = json.loads((folder / "flam" / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    named = {canonicalize_name(one["name"]): one["version"].split("+")[0] for one in bill["components"]}
    assert {name: version for name, version in _installed(python).items() if named.get(name) != version} == {}
