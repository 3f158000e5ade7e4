"""README and docs say what is there: targets, files, recipes, worlds, flags."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flam_core.recipes import RECIPES
from flam_core.worlds import WORLDS

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()


def test_every_make_target_exists() -> None:
    named = set(re.findall(r"make ([a-z0-9-]+)", README))
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test", "worlds", "check"} <= named
    assert named <= targets


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test\n" in (REPOSITORY / ".ci/run").read_text()


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((REPOSITORY / link).exists() for link in links), links


def test_named_recipes_and_worlds_exist() -> None:
    assert set(re.findall(r"jobs/train\.py ([a-z]+)", README)) <= set(RECIPES)
    assert all(f"`{world}`" in README for world in WORLDS)


@pytest.mark.parametrize("job", ["ingest", "train", "evaluate", "tune", "promote", "generate", "policy"])
def test_every_flag_of_the_readme_is_taken(job: str) -> None:
    """Each `--flag` that README gives to a job is one that its `--help` lists."""
    done = subprocess.run(
        [sys.executable, f"jobs/{job}.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    commands = README.replace("\\\n", " ")
    flags = {
        flag for line in re.findall(rf"jobs/{job}\.py ([^\n`]*)", commands) for flag in re.findall(r"--[\w.]+", line)
    }
    assert flags
    assert all(flag in done.stdout for flag in flags), flags


def test_exit_codes_are_documented() -> None:
    from flam_core import errors

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs/errors.md").read_text(), re.M)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FlamError)]
    assert documented == {0} | {kind.exit_code for kind in kinds if kind is not errors.FlamError}
