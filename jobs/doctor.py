"""Is the cluster fit for a run? A table of what was looked at, with what to do beside each red row (then exit code 3).

python jobs/doctor.py                               this machine, as `make train` would use it
python jobs/doctor.py --address 10.0.0.1:6379 --data s3://bucket/grid --storage s3://bucket/runs \
    --tracking https://mlflow --workers 8 --gpu     a cluster, as that run would use it
python jobs/doctor.py --security                    also: who is let in without a key

It writes and deletes an object in the storage and a run in MLflow, from here and from each node. --json prints the same
for programs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/doctor.py` puts only jobs/ on the path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flam_core.errors import EnvironmentFault
from services.console import run_program
from services.doctor import DoctorSettings, Finding, State, examine

_COLOURS = {State.OK: "green", State.NOTE: "yellow", State.RED: "bold red"}


@dataclass(frozen=True)
class Arguments(DoctorSettings):
    """What `jobs/doctor.py` takes."""

    json: bool = False
    """Print the findings as JSON instead of a table."""


def main(arguments: Arguments) -> None:
    """Look, print, and end with 3 if something is red."""
    findings = examine(arguments)
    if arguments.json:
        print(json.dumps([asdict(one) for one in findings], indent=1))
    else:
        _show(findings)
    if bad := [one.check for one in findings if one.state == State.RED]:
        raise EnvironmentFault(f"{len(bad)} of {len(findings)} checks are red: {', '.join(bad)}")


def _show(findings: Sequence[Finding]) -> None:
    drawn = Table("", "check", "seen, and what to do", title="doctor", title_justify="left")
    for one in findings:
        words = Text(one.seen)
        if one.fix:
            words.append(f"\n{one.fix}", style="bold")
        drawn.add_row(Text(one.state.value, style=_COLOURS[one.state]), one.check, words)
    Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160"))).print(drawn)


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
