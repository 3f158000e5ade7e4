"""Learn policies from videos and few labels, and compare them with behaviour cloning on the same labels.

    python jobs/policy.py --plan                                 # what would run, and about how long it takes
    python jobs/policy.py                                        # grid: reach the goal; 1k and 10k labels, 3 seeds
    python jobs/policy.py --envs grid bigfish starpilot          # the last two need `make worlds`
    python jobs/policy.py --envs bigfish --model models:/flam-bigfish@champion

An expert's videos become a data set; FLAM infers latent actions on all of it; a decoder that is fitted on the labels
names them; a policy is cloned from these names and plays on unseen levels (docs/policy.md). A run that was stopped goes
on where it was: the same command again does what is not done. Table, plot and the result of each policy go to
docs/results/, or where --out says.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/policy.py` puts only jobs/ on the path

from services.console import run_program, table
from services.policy import (
    PolicySettings,
    evidence,
    policy_cells,
    rows_of,
    run_policies,
    show_plan,
    summary,
    with_model,
    write_results,
)
from services.study.table import describe_hardware


@dataclass(frozen=True)
class Arguments:
    """What `jobs/policy.py` takes."""

    settings: Annotated[PolicySettings, tyro.conf.arg(name="")] = field(default_factory=PolicySettings)
    plan: bool = False
    """Say what would run and about how long it takes, and run nothing."""


def main(arguments: Arguments) -> None:
    """Run, and write the table anew after each policy, so that a stopped run shows what it has."""
    settings = with_model(arguments.settings)
    if arguments.plan:
        show_plan(settings)
        return
    cells = policy_cells(settings)
    begun = time.monotonic()
    results = {}
    written: list[Path] = []
    for cell, result in run_policies(cells, settings):
        results[cell.name] = cell, result
        done = [results[one.name] for one in cells if one.name in results]
        about = {
            "command": shlex.join(["python", "jobs/policy.py", *sys.argv[1:]]),
            "hardware": describe_hardware(settings.tasks, settings.threads, settings.gpus),
            "cells": f"{len(done)} of {len(cells)}",
            **evidence(settings, (cell for cell, _ in done)),
            "hours_of_cells": round(sum(one["seconds"] for _, one in done) / 3600, 2),
        }
        written = write_results(Path(settings.out), rows_of(done), about)
    table("return on unseen levels", summary(rows_of(results[one.name] for one in cells)))
    print(f"{len(results)} cells, {(time.monotonic() - begun) / 60:.0f} min:", *written, sep="\n  ", flush=True)


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
