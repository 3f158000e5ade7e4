"""Parses command lines with the jobs' own parsers, and runs none of them: one process, which imports everything once.

python -m tests.docs.parse    reads [[job, argument ...], ...] as JSON, and writes [{code, said}, ...]
"""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import services.console
from services.console import run_program

REPOSITORY = Path(__file__).resolve().parents[2]


def parse(words: list[str]) -> dict[str, Any]:
    """What the program answers to the arguments: its exit code, and all that it prints."""
    said, code = StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            _ray(words[1:]) if words[0] == "ray" else _job(words[0], words[1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return {"code": code, "said": said.getvalue()}


def _job(name: str, arguments: list[str]) -> None:
    path = REPOSITORY / "jobs" / f"{name}.py"
    if not path.exists():
        sys.exit(f"there is no jobs/{name}.py")
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def _ray(arguments: list[str]) -> None:
    import click
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    try:
        command.make_context(str(command.name), arguments)
    except click.ClickException as error:
        sys.exit(error.format_message())


def _only_parse(arguments: Any, body: Any, **rest: Any) -> None:
    run_program(arguments, lambda _: None, **rest)


if __name__ == "__main__":
    services.console.run_program = _only_parse
    json.dump([parse(words) for words in json.load(sys.stdin)], sys.stdout)
