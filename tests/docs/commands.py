"""Finds the shell commands in README and docs, and what each block of them says of how it is tested.

A fence without a language, or of a shell, holds commands; everything else names its language. The line before a block
says, as an HTML comment that no reader sees, what becomes of its commands:

    <!-- run -->                           all are run, in an empty home, by tests/docs/test_commands.py
    <!-- run: given ~/clips, data/grid --> the same in a home that has these
    <!-- run slowly: given ... -->         the same, with the slow tests
    <!-- checked by: tests/a.py -->        those tests run the same programs
    <!-- not run: why -->                  no test can

Whatever it says, every command is parsed by the program that it is for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHELLS = ("", "sh", "bash", "shell", "console")
PROGRAMS = ("python", "make", "ray", "pip", "kubectl", "helm", "docker", "export", "source", "apt-get", "mlflow")
"""What a command may begin with; also a script of the repository."""
MARKERS = ("run", "run slowly", "checked by", "not run")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- *(?P<kind>[a-z ]+?) *(?:: *(?P<what>[^\n]*?))? *-->\s*\Z")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Command:
    """One command line."""

    words: tuple[str, ...]

    @property
    def job(self) -> str | None:
        """The program in jobs/ that it starts itself."""
        at = 1 if self.words[0] == "python" else 0
        found = re.fullmatch(r"jobs/(\w+)\.py", self.words[at]) if len(self.words) > at else None
        return found[1] if found else None

    @property
    def arguments(self) -> list[str]:
        """Of the job: what follows its file."""
        return list(self.words[2 if self.words[0] == "python" else 1 :])

    @property
    def inner(self) -> Command | None:
        """The command that it hands on to a cluster, after `--`."""
        words = self.words[self.words.index("--") + 1 :] if "--" in self.words else ()
        return Command(words) if words else None

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    body: str
    kind: str
    """Of its marker; nothing if it has none."""
    what: str
    """What the marker says."""

    @property
    def shell(self) -> bool:
        """Whether it holds commands."""
        return self.language in SHELLS

    @property
    def given(self) -> list[str]:
        """What a home must have for it to be run."""
        return [one.strip() for one in self.what.removeprefix("given ").split(",")] if self.what else []

    @property
    def commands(self) -> list[Command]:
        """Its command lines, without comments and without those that they hand on."""
        return [Command(words) for line in _lines(self.body) if (words := _words(line))]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> dict[str, str]:
    """README and all pages, by their path in the repository."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), *sorted(_api())]
    return {page.relative_to(REPOSITORY).as_posix(): page.read_text() for page in pages}


def _api() -> Iterator[Path]:
    return (REPOSITORY / "docs" / "api").glob("*.md")


def blocks() -> list[Block]:
    """All fenced blocks."""
    return [block for document, text in documents().items() for block in blocks_of(document, text)]


def blocks_of(document: str, text: str) -> Iterator[Block]:
    """Those of one document."""
    for found in _FENCE.finditer(text):
        before = text[: found.start()]
        marker = _MARKER.search(before[before.rstrip().rfind("\n") + 1 :])
        yield Block(
            document,
            before.count("\n") + 1,
            found["language"].strip().split(" ")[0],
            found["body"],
            marker["kind"] if marker else "",
            (marker["what"] or "") if marker else "",
        )


def prose() -> Iterator[tuple[str, str]]:
    """(document, text without fenced blocks)"""
    return ((document, _FENCE.sub("", text)) for document, text in documents().items())


def inline() -> Iterator[tuple[str, str]]:
    """(document, code within a line)"""
    return ((document, " ".join(code.split())) for document, text in prose() for code in _CODE.findall(text))


def flags(words: tuple[str, ...] | list[str]) -> list[str]:
    """The flags among words, without their values."""
    return [word.partition("=")[0] for word in words if re.match(r"--[a-zA-Z]", word)]


def _lines(body: str) -> list[str]:
    return [line.strip().removeprefix("$ ") for line in body.replace("\\\n", " ").splitlines()]


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):  # variables for this command alone
        words = words[1:]
    return tuple(words)
