"""Repeat what flam claims of its model: many small trainings, one table.

    python jobs/study.py factoring                      # FLAM and its rivals on grids with 2, 4 and 8 agents
    python jobs/study.py factoring --models flam monolithic-vq --agents 4 --seeds 1
    python jobs/study.py ablations                      # FLAM with one thing changed at a time
    python jobs/study.py factoring --recipe multigrid --gpus 1 --tasks 8

A study that was stopped goes on where it was: the same command again does what is not done. The table, the CSV, the
plot and the result of each training go to docs/results/, or where --out says. Another --out and another --folder do all
trainings anew.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/study.py` puts only jobs/ on the path

from services.console import run_program
from services.study import StudySettings, ablation_cells, factoring_cells, run_study
from services.study.table import describe_hardware, rows_of, write_results


@dataclass(frozen=True)
class Factoring:
    """FLAM and its rivals as the number of agents grows."""

    settings: Annotated[StudySettings, tyro.conf.arg(name="")] = field(default_factory=StudySettings)


@dataclass(frozen=True)
class Ablations:
    """FLAM with one thing changed at a time, with four agents."""

    settings: Annotated[StudySettings, tyro.conf.arg(name="")] = field(default_factory=StudySettings)


@dataclass(frozen=True)
class Arguments:
    """What `jobs/study.py` takes."""

    study: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Factoring, tyro.conf.subcommand("factoring")]
        | Annotated[Ablations, tyro.conf.subcommand("ablations")]
    ]


def main(arguments: Arguments) -> None:
    """Run, and write the table anew after each training, so that a stopped study shows what it has."""
    settings = arguments.study.settings
    name, cells_of = (
        ("factoring", factoring_cells) if isinstance(arguments.study, Factoring) else ("ablations", ablation_cells)
    )
    cells = cells_of(settings)
    begun = time.monotonic()
    results = {}
    written: list[Path] = []
    for cell, result in run_study(cells, settings):
        results[cell.name] = cell, result
        done = [results[one.name] for one in cells if one.name in results]
        about = {
            "command": shlex.join(["python", "jobs/study.py", *sys.argv[1:]]),
            "hardware": describe_hardware(settings.tasks, settings.threads, settings.gpus),
            "trainings": f"{len(done)} of {len(cells)}",
            "hours_of_training": round(sum(one["seconds"] for _, one in done) / 3600, 2),
        }
        written = write_results(Path(settings.out), name, rows_of(done), about)
    print(f"{len(results)} trainings, {(time.monotonic() - begun) / 60:.0f} min:", *written, sep="\n  ", flush=True)


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
