"""What the tests of README and docs share: made once in a test run, however many processes it has."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.commands import REPOSITORY, Command, blocks, inline

_FOREIGN = ("RAY_", "MLFLOW_", "AWS_", "FLAM_")

SUBCOMMANDS = {
    "bench": ("feed", "order", "model", "chaos", "overhead", "serve"),
    "study": ("factoring", "ablations"),
    "ingest": ("--verify",),
}
"""What a job's help is asked for beside the job itself, since each lists flags of its own."""


@dataclass(frozen=True)
class Answer:
    """Of a program, to arguments that it only parses."""

    code: int
    said: str


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Gives the folder of a name, made by a function if no process of this test run has made it yet."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = base / f"docs-{name}"
        with (base / f"docs-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                fresh = base / f"docs-{name}.part"
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                fill(fresh)
                fresh.rename(folder)
        return folder

    return make


def environment(home: Path | None = None) -> dict[str, str]:
    """What a user's shell has: nothing of this test session's. `python` is this Python."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    return {
        **kept,
        **({} if home is None else {"HOME": str(home)}),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "COLUMNS": "240",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def questions() -> list[tuple[str, ...]]:
    """All that the jobs' parsers are asked: job and arguments."""
    asked = [(job.stem, "--help") for job in sorted((REPOSITORY / "jobs").glob("*.py")) if job.stem != "__init__"]
    asked += [
        (job, word, *(["x"] if word[0] == "-" else []), "--help") for job in SUBCOMMANDS for word in SUBCOMMANDS[job]
    ]
    asked += [("train", "tiny", "--no_such_flag", "1"), ("train", "tinny")]  # which must not be taken
    for command in [*documented(), *(one for _, one in mentioned())]:
        asked += [question for one in (command, command.inner) if one and (question := asks(one))]
    return list(dict.fromkeys(asked))


def documented() -> list[Command]:
    """The commands of all blocks."""
    return [command for block in blocks() if block.shell for command in block.commands]


def mentioned() -> list[tuple[str, Command]]:
    """(document, command) of all complete commands within a line: not where something is left out of them."""
    return [
        (document, Command(tuple(code.split())))
        for document, code in inline()
        if (code.startswith("python jobs/") and " " in code[7:]) or (code.startswith("ray ") and " --" in code)
        if "..." not in code and "…" not in code
    ]


def asks(command: Command) -> tuple[str, ...] | None:
    """What `tests.docs.parse` is asked of a command; None for one that is of another program."""
    if command.job is not None:
        return (command.job, *command.arguments)
    return command.words if command.words[0] == "ray" else None


@pytest.fixture(scope="session")
def answers(once: Callable[[str, Callable[[Path], None]], Path]) -> dict[tuple[str, ...], Answer]:
    """What the programs answer to `questions`."""
    asked = questions()

    def ask(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tests.docs.parse"],
            input=json.dumps(asked),
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (folder / "answers.json").write_text(done.stdout)

    found = json.loads((once("answers", ask) / "answers.json").read_text())
    return {question: Answer(**answer) for question, answer in zip(asked, found, strict=True)}


@pytest.fixture(scope="session")
def helps(answers: dict[tuple[str, ...], Answer]) -> dict[str, str]:
    """The help of each job, with that of its subcommands."""
    found: dict[str, str] = {}
    for question, answer in answers.items():
        if question[-1] == "--help":
            assert answer.code == 0, f"{question}: {answer.said}"
            found[question[0]] = found.get(question[0], "") + answer.said
    return found
