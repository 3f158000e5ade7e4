"""What is wrong with a Dockerfile, by its instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.infra.rules import SECRET_NAME


@dataclass(frozen=True)
class Instruction:
    """A word and what follows it, continued lines joined."""

    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """All of a Dockerfile, without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        found.append(Instruction(word.upper(), rest.strip()))
    return found


def lint(text: str) -> list[str]:
    """All that breaks a rule, as `rule: what`."""
    found: list[str] = []
    defaults: dict[str, str] = {}
    stages: dict[str, list[Instruction]] = {}
    stage = ""
    for one in instructions(text):
        if one.word == "ARG":
            name, _, default = one.rest.partition("=")
            defaults[name] = default
            found += [f"secret: ARG {name}"] if SECRET_NAME.search(name) else []
        elif one.word == "FROM":
            image, _, name = re.sub(r"^--\S+\s+", "", one.rest).partition(" AS ")
            if image not in stages:
                found += _unpinned(image, defaults)
                stages[name] = []
            else:
                stages[name] = list(stages[image])  # a stage goes on with the user of the one it is made from
            stage = name
            continue
        if stage:
            stages[stage].append(one)
        found += _of_instruction(one)
    for name, steps in stages.items():
        if not _left_behind(name, text):
            users = [one.rest.partition(":")[0] for one in steps if one.word == "USER"]
            if not users or users[-1] in ("0", "root"):
                found.append(f"user: stage {name} runs as root")
            elif not users[-1].isdigit():
                found.append(f"user: stage {name}: Kubernetes cannot tell that {users[-1]} is not root")
    return found


def _left_behind(name: str, text: str) -> bool:
    """Whether others only copy from a stage or go on from it: no image is made of it."""
    return bool(re.search(rf"^(COPY --from={re.escape(name)} |FROM {re.escape(name)} )", text, re.MULTILINE))


def _unpinned(image: str, defaults: dict[str, str]) -> list[str]:
    digest = image.partition("@")[2]
    variable = re.fullmatch(r"\$\{(\w+)\}", digest)
    if variable and variable[1] in defaults:
        # Without a default nothing is built before somebody has looked the digest up.
        digest = defaults[variable[1]] or f"sha256:{'0' * 64}"
    pinned = re.fullmatch(r"sha256:[0-9a-f]{64}", digest) and ":" in image.partition("@")[0]
    return [] if pinned else [f"from: {image} is not pinned"]


def _of_instruction(one: Instruction) -> list[str]:
    found = []
    if one.word == "ADD":
        found.append(f"add: {one.rest}: COPY does what is needed, and fetches and unpacks nothing")
    if one.word == "ENV":
        found += [f"secret: ENV {name}" for name in re.findall(r"(\w+)=", one.rest) if SECRET_NAME.search(name)]
    if one.word == "RUN":
        if "apt-get install" in one.rest and "rm -rf /var/lib/apt/lists" not in one.rest:
            found.append(f"apt: {one.rest}: leaves the lists of packages in the image")
        if re.search(r"\bpip3? install\b", one.rest):
            if "--no-cache-dir" not in one.rest:
                found.append(f"pip: {one.rest}: leaves pip's cache in the image")
            if "-c constraints.txt" not in one.rest and "-r sbom.txt" not in one.rest:
                found.append(f"pip: {one.rest}: takes versions that are not pinned")
        if re.search(r"\b(curl|wget)\b", one.rest):
            found.append(f"fetch: {one.rest}: what it fetches is not pinned")
    return found
