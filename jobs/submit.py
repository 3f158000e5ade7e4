"""Send a program of flam to a Ray cluster, and show what it prints until it ends with the same exit code.

python jobs/submit.py --address http://head:8265 -- python jobs/train.py multigrid --data s3://bucket/multigrid
python jobs/submit.py --env FLAM_HOME=/shared/flam --no_wait -- python jobs/tune.py

It is `ray job submit --working-dir .` with checks beforehand: that the folder is small enough to send (if not, it says
which files are the largest), that the cluster is there and takes the token (RAY_AUTH_MODE=token),
and that no secret goes along.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/submit.py` puts only jobs/ on the path

from flam_core.errors import SettingsError
from services.console import run_program
from services.submit import UPLOAD_LIMIT_MIB, Submission, submit


@dataclass(frozen=True)
class Arguments:
    """What `jobs/submit.py` takes before `--`; after it comes the program."""

    address: str = field(default_factory=lambda: os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    """Of the cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, or this machine's."""
    working_dir: Path = Path()
    """Folder that the program runs in, sent without what .gitignore and .rayignore name."""
    env: tuple[str, ...] = ()
    """NAME=VALUE pairs for its environment. FLAM_HOME is sent from this one if it is set."""
    name: str | None = None
    """Of the job, for `ray job logs` and `ray job stop`; Ray makes one up by default."""
    no_wait: bool = False
    """End as soon as the job is accepted."""
    limit_mib: float = UPLOAD_LIMIT_MIB
    """What the folder may send at most."""


def main(arguments: Arguments) -> None:
    """Check, send, follow."""
    if odd := [pair for pair in arguments.env if "=" not in pair]:
        raise SettingsError(f"--env {' '.join(odd)}", fix="Give NAME=VALUE.")
    variables = {"FLAM_HOME": os.environ["FLAM_HOME"]} if "FLAM_HOME" in os.environ else {}
    variables |= dict(pair.split("=", 1) for pair in arguments.env)
    job = Submission(
        tuple(_program), arguments.address, arguments.working_dir, variables, arguments.name, arguments.limit_mib
    )
    if code := submit(job, wait=not arguments.no_wait):
        sys.exit(code)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What is for this program, and the program to submit."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    _own, _program = _split(sys.argv[1:])
    run_program(Arguments, main, argv=_own, description=__doc__ or "")
