"""What every job's program has in common."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal
import sys
from dataclasses import dataclass
from services.console import run_program

@dataclass(frozen=True)
class Arguments:
    pass

def main(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    print("begun")
    sys.stdin.read()

run_program(Arguments, main, argv=[], **eval(sys.argv[1]))
"""


def test_what_is_printed_can_be_read_before_the_program_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, "{}"], stdin=-1, stdout=-1, text=True) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "begun\n"  # not before the end, were it kept: the program waits for us
        program.stdin.close()
    assert program.returncode == 0


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        ({}, 75, "goes on from what was kept, or begins anew where nothing was."),
        ({"keeps": False}, 130, "begins anew."),
    ],
)
def test_a_program_that_is_interrupted_promises_no_more_than_it_keeps(options: dict, code: int, why: str) -> None:
    words = [sys.executable, "-c", PROGRAM, repr(options)]
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "begun\n"
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == code
        assert program.stderr.read() == f"flam: stopped. The same command {why}\n"
