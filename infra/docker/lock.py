"""Writes locks/: each package of the images with version and sha256, as `pip install --require-hashes` takes them.

    python infra/docker/lock.py                # after a change of constraints.txt or of pyproject.toml; minutes
    python infra/docker/lock.py --cpu 2.13.0+cpu   # also PyTorch's CPU build, where pip finds it (PIP_EXTRA_INDEX_URL)

For Linux on x86-64 and the Python that runs it, which must be that of the Dockerfile. Versions are those of
constraints.txt; what that does not name (PostgreSQL's driver, CUDA, the SBOM's tool) is chosen by pip.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCKS = Path(__file__).resolve().parent / "locks"
SERVER = ("Flask-WTF", "psycopg2-binary==2.9.13")
"""What an MLflow server with passwords and PostgreSQL needs beside MLflow."""
SBOM = ("cyclonedx-bom==7.5.0",)
CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
"""Packages that only the CUDA build of PyTorch brings, and that build itself."""
FLAM = "flam"

Packages = dict[str, tuple[str, str]]
"""Version and sha256 by name."""


def resolve(*wanted: str, constrained: bool = True, dependencies: bool = True) -> Packages:
    """What pip would install. Raises ValueError for what has no hash, such as a source folder."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary", ":all:", "--report", str(report)]
        command += ["--constraint", "constraints.txt"] if constrained else []
        command += [] if dependencies else ["--no-deps"]
        subprocess.run([*command, *wanted], cwd=ROOT, check=True)
        return read(json.loads(report.read_text()))


def read(report: dict[str, Any]) -> Packages:
    """The packages of pip's report, but for flam itself."""
    found = {}
    for one in report["install"]:
        name = re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower()
        if name == FLAM:
            continue
        sha256 = one["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256 is None:
            raise ValueError(f"{name} comes without a hash")
        found[name] = one["metadata"]["version"], sha256
    return found


def write(name: str, packages: Packages) -> None:
    """One of the locks."""
    lines = ["# Made by infra/docker/lock.py; do not edit."]
    lines += [f"{key}=={version} --hash=sha256:{sha256}" for key, (version, sha256) in sorted(packages.items())]
    (LOCKS / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    """Resolve and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", metavar="VERSION", help="of PyTorch's CPU build; without it cpu.txt stays as it is")
    cpu = parser.parse_args().cpu
    if cpu is not None:
        write("cpu.txt", resolve(f"torch=={cpu}", dependencies=False))
    packages = resolve(".[service]", *SERVER)
    if "triton" not in packages:
        raise ValueError("pip took a CPU build of PyTorch: run this where its index has the CUDA build")
    write("cuda.txt", {name: one for name, one in packages.items() if CUDA.fullmatch(name)})
    write("common.txt", {name: one for name, one in packages.items() if not CUDA.fullmatch(name)})
    write("mlflow.txt", resolve("mlflow", "boto3", *SERVER))
    write("sbom.txt", resolve(*SBOM, constrained=False))


if __name__ == "__main__":
    main()
