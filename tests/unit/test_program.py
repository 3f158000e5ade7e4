"""What every job's program has in common."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from dataclasses import dataclass
from services.console import run_program

@dataclass(frozen=True)
class Arguments:
    pass

def main(arguments):
    print("begun")
    sys.stdin.read()

run_program(Arguments, main, argv=[])
"""


def test_what_is_printed_can_be_read_before_the_program_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=-1, stdout=-1, text=True) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "begun\n"  # not before the end, were it kept: the program waits for us
        program.stdin.close()
    assert program.returncode == 0
