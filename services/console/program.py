"""How every program of flam parses its arguments and ends."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from flam_core.errors import FlamError, Stopped

ArgsT = TypeVar("ArgsT")
_INTERRUPTED = 130
"""128 and the number of SIGINT."""


def run_program(
    arguments: type[ArgsT],
    body: Callable[[ArgsT], None],
    *,
    argv: Sequence[str] | None = None,
    default: Callable[[list[str]], ArgsT] | None = None,
    description: str = "",
    keeps: bool = True,
) -> None:
    """Parse the command line into `arguments`, call `body`, and end the process with the documented exit code.

    default: given the arguments (of which it may take some away from the front), returns what the fields start from,
    such as a recipe. keeps: whether a program that is interrupted (Ctrl-C) may have kept something for the same command
    to go on from. If not, its exit code is a shell's for that (130), not that of what is resumable (75). `--debug`
    anywhere shows the traceback of an error; without it, an error is one line.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log is followed while it is written, also where it is a file
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        start = default(words) if default else None
        parsed = (
            tyro.cli(arguments, args=words, description=description, use_underscores=True)
            if start is None
            else tyro.cli(arguments, args=words, default=start, description=description, use_underscores=True)
        )
        body(parsed)
    except FlamError as error:
        _report(error, debug)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        # Not every program has steps, and one that has may be interrupted before the first is committed.
        fix = "goes on from what was kept, or begins anew where nothing was" if keeps else "begins anew"
        print(f"flam: {Stopped('stopped', fix=f'The same command {fix}.')}", file=sys.stderr, flush=True)
        sys.exit(Stopped.exit_code if keeps else _INTERRUPTED)


def _report(error: FlamError, debug: bool) -> None:
    if debug:
        Console(stderr=True).print_exception()
    print(f"flam: error: {error}", file=sys.stderr, flush=True)


class Progress:
    """A progress bar on a terminal; a line every few percent in a log."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar = RichProgress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn()
        )
        self._task = self._bar.add_task(what, total=None)
        self._terminal = sys.stdout.isatty()
        self._shown = 0

    def __enter__(self) -> Progress:
        if self._terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """`done` frames of `total` (None: unknown) are done."""
        if self._terminal:
            self._bar.update(self._task, completed=done, total=total)
            return
        tenth = done * 10 // total if total else done // 100_000
        if tenth > self._shown:
            self._shown = tenth
            print(f"{self._what}: {done}{f' of {total}' if total else ''} frames", flush=True)


def live_line() -> Callable[[str], None]:
    """Shows a line in place of the one before on a terminal; in a log, nothing."""
    if not sys.stdout.isatty():
        return lambda _line: None
    status = Console().status("")
    status.start()
    return lambda line: status.update(line)


def table(title: str, rows: Mapping[str, str]) -> None:
    """Print a two-column table."""
    drawn = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        drawn.add_row(name, value)
    # In a log there is no terminal to ask for its width; long paths must not be cut.
    Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160"))).print(drawn)
