"""`.ci/run` installs what tests start, and says what it does without."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("chromium", "monitoring", "postgresql")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """In which `make` and all that installs do nothing but say their names."""
    folder = tmp_path / "flam"
    for script in ("bin/make", "bin/id", *(f"infra/{part}/install.sh" for part in PARTS)):
        place = folder / script
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f'#!/bin/sh\necho "{script} $*"\n')
        place.chmod(0o755)
    (folder / "bin" / "id").write_text("#!/bin/sh\necho 0\n")
    (folder / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", folder / ".ci")
    (tmp_path / "shared" / "crds").mkdir(parents=True)
    return folder


def ci(checkout: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{checkout}/bin{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([checkout / ".ci" / "run"], env=env, capture_output=True, text=True, timeout=60, check=False)


def test_what_tests_start_is_installed_before_they_run(checkout: Path) -> None:
    done = ci(checkout)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for part in PARTS[1:]:
        assert said.index(f"infra/{part}/install.sh ") < said.index("bin/make test")


def test_what_cannot_be_installed_is_said_and_skipped(checkout: Path) -> None:
    (checkout / "infra" / "postgresql" / "install.sh").write_text("#!/bin/sh\nexit 3\n")
    done = ci(checkout)
    assert done.returncode == 0, done.stderr
    assert "infra/postgresql/install.sh failed" in done.stderr
    assert "bin/make test" in done.stdout
    (checkout / "bin" / "id").write_text("#!/bin/sh\necho 1000\n")
    plain = ci(checkout)
    assert "infra/monitoring/install.sh needs root" in plain.stderr
    assert "infra/monitoring/install.sh " not in plain.stdout


def test_schemas_that_are_missing_are_said(checkout: Path) -> None:
    shutil.rmtree(checkout.parent / "shared")
    done = ci(checkout)
    assert done.returncode == 0, done.stderr
    assert "crds is missing" in done.stderr
    assert "bin/make test" in done.stdout
