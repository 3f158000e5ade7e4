"""Dockerfiles: what they say, what is wrong with it, and their steps done without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SECRET = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|PRIVATE|(ACCESS|API)[_-]?KEY", re.IGNORECASE)
_DIGEST = re.compile(r"[^\s:@]+(:[\w.-]+)?@sha256:[0-9a-f]{64}")
_PIP = re.compile(r"\bpip3?\s+install\b[^&|;]*")


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and what follows it."""

    def values(self, instruction: str) -> list[str]:
        """What follows each of these instructions."""
        return [value for word, value in self.steps if word == instruction]


def parse(text: str) -> list[Stage]:
    """The stages in order. Continued lines are joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, _, value = line.strip().partition(" ")
        if word.upper() == "FROM":
            base, _, name = value.partition(" AS ")
            stages.append(Stage(base.strip(), name.strip()))
        elif stages:
            stages[-1].steps.append((word.upper(), value.strip()))
        else:
            raise ValueError(f"{word} before any FROM: {value}")
    return stages


def lineage(stages: list[Stage], name: str) -> list[Stage]:
    """The stage and those that it is made from, the first first."""
    known = {one.name: one for one in stages}
    stage = known[name]
    return [*(lineage(stages, stage.base) if stage.base in known else []), stage]


def faults(text: str) -> list[str]:
    """What an image should not be made by."""
    stages = parse(text)
    return [*_of_bases(stages), *_of_users(stages), *_of_steps(stages)]


def _of_bases(stages: list[Stage]) -> Iterator[str]:
    names = {one.name for one in stages}
    for one in stages:
        if one.base not in names and not _DIGEST.fullmatch(one.base):
            yield f"FROM {one.base}: not by digest"


def _of_users(stages: list[Stage]) -> Iterator[str]:
    """Of images, which are the stages that no other is made from or takes files from."""
    taken = {one.base for one in stages}
    for one in stages:
        taken |= {found[1] for value in one.values("COPY") if (found := re.search(r"--from=(\S+)", value))}
    for one in stages:
        if one.name in taken:
            continue
        users = [user for each in lineage(stages, one.name) for user in each.values("USER")] or ["root"]
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
            yield f"stage {one.name}: USER {users[-1]} is not the number of another than root"


def _of_steps(stages: list[Stage]) -> Iterator[str]:
    for stage in stages:
        for word, value in stage.steps:
            if word == "ADD":
                yield f"ADD {value}: COPY does it, and fetches nothing"
            if word in ("ARG", "ENV") and any(_SECRET.search(part.partition("=")[0]) for part in value.split()):
                yield f"{word} {value}: whoever has the image reads it"
            if word == "RUN":
                yield from _of_command(value)


def _of_command(command: str) -> Iterator[str]:
    for pip in _PIP.findall(command):
        if "--no-cache-dir" not in pip:
            yield f"{pip}: leaves pip's cache in the image"
        if "--require-hashes" not in pip and "--no-deps" not in pip:
            yield f"{pip}: takes what has no hash"
    if "apt-get install" in command and not ("--no-install-recommends" in command and "/var/lib/apt/lists" in command):
        yield f"{command}: recommended packages and package lists stay in the image"
    if re.search(r"\b(curl|wget)\b", command):
        yield f"{command}: what comes from elsewhere has no hash"
    if re.search(r"\bsudo\b|chmod\s+(-\w+\s+)?777", command):
        yield f"{command}: gives rights away"


def do(stages: list[Stage], context: Path, root: Path, arguments: Mapping[str, str]) -> dict[str, str]:
    """The COPY and RUN steps of stages, one after the other, below `root` in place of `/`; the environment they leave.

    arguments: as `--build-arg`. Absolute paths in RUN steps are those below `root`.
    """
    variables: dict[str, str] = {}
    folder = root
    for stage in stages:
        for word, value in stage.steps:
            if word == "WORKDIR":
                folder = _below(root, value, folder)
                folder.mkdir(parents=True, exist_ok=True)
            elif word == "ENV":
                variables |= dict(part.partition("=")[::2] for part in value.split())
            elif word == "ARG":
                name, _, default = value.partition("=")
                variables[name] = arguments.get(name, default)
            elif word == "COPY":
                if "--from=" in value:
                    raise ValueError(f"COPY {value}: from another stage")
                *sources, target = value.split()
                _copy([context / source for source in sources], _below(root, target, folder), into=target.endswith("/"))
            elif word == "RUN":
                command = re.sub(r"(?<![\w./])/(opt|src|app|home)\b", rf"{root}/\1", value)
                environment = {**os.environ, **{name: one for name, one in variables.items() if one}}
                subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, check=True)
    return variables


def _below(root: Path, place: str, folder: Path) -> Path:
    return root / place.lstrip("/") if place.startswith("/") else folder / place


def _copy(sources: list[Path], target: Path, *, into: bool) -> None:
    for source in sources:
        place = target / source.name if into and source.is_file() else target
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, place)
