"""What is installed is what is pinned: nothing comes in beside constraints.txt."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = {"pip", "setuptools", "wheel", "flam"}
"""What a virtual environment has before anything is installed, and flam itself."""


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^\s;]+)(?:\s*;.*)?", line.strip())
            assert match, f"not an exact pin: {line}"
            found[canonicalize_name(match[1])] = match[2]
    return found


def wanted() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [one for group in groups for line in group if (one := Requirement(line)).name != "flam"]


def test_every_pin_is_exact_and_each_requirement_has_one() -> None:
    known = pins()
    missing = [str(one) for one in wanted() if canonicalize_name(one.name) not in known]
    assert missing == []
    assert [str(one) for one in wanted() if not one.specifier.contains(known[canonicalize_name(one.name)])] == []


def test_nothing_is_installed_that_is_not_pinned() -> None:
    known = pins()
    odd = {}
    for one in metadata.distributions():
        name = canonicalize_name(one.metadata["Name"])
        if name not in TOOLS and known.get(name) != one.version.split("+")[0]:
            odd[name] = f"{one.version} installed, {known.get(name, 'no')} pinned"
    assert odd == {}
