"""README and docs say what is there: recipes, worlds, linked files, exit codes. Commands: test_commands.py."""

from __future__ import annotations

import re
from pathlib import Path

from flam_core.recipes import RECIPES
from flam_core.worlds import WORLDS

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test\n" in (REPOSITORY / ".ci/run").read_text()


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((REPOSITORY / link).exists() for link in links), links


def test_named_recipes_and_worlds_exist() -> None:
    assert set(re.findall(r"jobs/train\.py ([a-z]+)", README)) <= set(RECIPES)
    assert all(f"`{world}`" in README for world in WORLDS)


def test_exit_codes_are_documented() -> None:
    from flam_core import errors

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs/errors.md").read_text(), re.M)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FlamError)]
    assert documented == {0} | {kind.exit_code for kind in kinds if kind is not errors.FlamError}
