"""Search factor counts and codebook sizes: many runs, one report on which settings the data want.

    python jobs/tune.py [recipe] --factors 2,4,8 --codebook 0,4,8,16 --seeds 3
    python jobs/tune.py tiny --data data/grid --factors 2,4,8 --beta 2e-4,1e-2 --plan
    python jobs/tune.py tiny --search tpe --points 20 --factors 2,3,4,6,8 --codebook 0,8 --latent_width 48,96
    ray job submit --working-dir . -- python jobs/tune.py multigrid --data s3://bucket/multigrid --gpu --factors 4,8

A sweep that was stopped, or whose driver was killed, goes on where it was: the same command again. Each trial is a run
like those of jobs/train.py, whose flags hold here, too. Report, pictures and sweep.json: STORAGE/sweeps/SWEEP_ID/.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/tune.py` puts only jobs/ on the path

from flam_core.config import Config
from flam_core.recipes import get_recipe
from services.console import run_program, table
from services.sweep.plan import show_plan
from services.sweep.prepare import prepare_sweep
from services.sweep.progress import Progress
from services.sweep.run import run_sweep
from services.sweep.settings import SweepSettings
from services.sweep.space import Space
from services.training.settings import TrainSettings, take_recipe


@dataclass(frozen=True)
class Arguments:
    """What `jobs/tune.py` takes."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    space: Annotated[Space, tyro.conf.arg(name="")] = field(default_factory=Space)
    sweep: Annotated[SweepSettings, tyro.conf.arg(name="")] = field(default_factory=SweepSettings)
    training: Annotated[TrainSettings, tyro.conf.arg(name="")] = field(default_factory=TrainSettings)
    plan: bool = False
    """Show the trials, what they cost and how long they will take, and run nothing."""


def from_recipe(words: list[str]) -> Arguments:
    """Take the recipe's name off the front; without one it is `tiny`."""
    return Arguments(get_recipe(take_recipe(words, "jobs/tune.py")))


def main(arguments: Arguments) -> None:
    """Check everything, then search, and report."""
    sweep = prepare_sweep(arguments.config, arguments.space, arguments.sweep, arguments.training)
    show_plan(sweep)
    if arguments.plan:
        return
    progress = Progress()
    try:
        report = run_sweep(sweep, progress)
    finally:
        progress.close()
    table(f"sweep {sweep.name}", {**report.tags, "report": str(report.place)})


if __name__ == "__main__":
    run_program(Arguments, main, default=from_recipe, description=__doc__ or "")
