"""Train FLAM: both stages, evaluation, report, registered model.

    python jobs/train.py [recipe] [--field value ...]
    python jobs/train.py tiny --data data/grid --model.factors 8
    python jobs/train.py --list
    python jobs/train.py --follow RUN
    ray job submit --working-dir . -- python jobs/train.py multigrid --data s3://bucket/multigrid --gpu --workers 8

The same command again resumes. Recipes: tiny, smoke, multigrid. Errors end with the exit codes of docs/errors.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/train.py` puts only jobs/ on the path

from flam_core.config import Config
from flam_core.recipes import get_recipe
from services.console import run_program, table
from services.training.launch import RunResult, train
from services.training.prepare import prepare
from services.training.runs import RunState, follow, list_runs
from services.training.settings import TrainSettings, take_recipe


@dataclass(frozen=True)
class Arguments:
    """What `jobs/train.py` takes."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = field(default_factory=TrainSettings)
    list: bool = False
    """Show the runs of the experiment, and train nothing."""
    follow: str | None = None
    """Show what the run of this id logs, until it ends, and train nothing."""


def from_recipe(words: list[str]) -> Arguments:
    """Take the recipe's name off the front; without one it is that of the run to resume, else `tiny`."""
    resumed = words[words.index("--resume") + 1].split("-")[0] if "--resume" in words[:-1] else ""
    named = bool(words) and not words[0].startswith("-")
    name = take_recipe(words, "jobs/train.py")
    return Arguments(get_recipe(name if named else resumed or name))


def main(arguments: Arguments) -> None:
    """Check everything, then train; or show other runs."""
    if arguments.list:
        show_runs(list_runs(arguments.settings))
        return
    if arguments.follow is not None:
        for line in follow(arguments.settings, arguments.follow):
            print(line, flush=True)
        return
    prepared = prepare(arguments.config, arguments.settings)
    print(f"run {prepared.run_id}: {prepared.manifest.name}, {prepared.manifest.frames} frames", flush=True)
    show(train(prepared))


def show_runs(runs: Sequence[RunState]) -> None:
    """A row for each."""
    table(
        f"{len(runs)} runs",
        {
            run.run_id: f"{run.state:<11}  step {'?' if run.step is None else run.step} of {run.total or '?'}  "
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(run.started))}  "
            f"{'' if run.psnr is None else f'{run.psnr:.2f} dB'}  {run.folder}"
            for run in runs
        },
    )


def show(result: RunResult) -> None:
    """The final table: what was learnt and where everything is."""
    keys = ("psnr@1", "psnr@10")
    rows = {
        f"{kind} {key}": f"{result.metrics[f'{kind}/{key}']:.2f} dB"
        for key in keys
        for kind in ("rollout", "copy", "shuffled")
        if f"{kind}/{key}" in result.metrics
    }
    rows["ceiling psnr"] = f"{result.metrics['ceiling/psnr']:.2f} dB"
    rows |= {f"DCI {k.upper()}": f"{result.metrics[f'dci/{k}']:.3f}" for k in "dci" if f"dci/{k}" in result.metrics}
    rows["frames/s"] = f"{result.feed['frames_per_second']:.0f}"
    rows["waited for data"] = f"{result.feed['data_wait_share']:.1%} of the time"
    rows["spilled"] = f"{result.feed['spilled_bytes']:.0f} bytes"
    if result.feed["broken_clips"]:
        rows["broken clips"] = f"{result.feed['broken_clips']:.0f} left out: {result.run / 'quarantine.json'}"
    wall = sum(result.goodput.values()) or 1.0
    shares = sorted(result.goodput.items(), key=lambda item: -item[1])
    rows["time"] = f"{wall:.0f} s: " + ", ".join(f"{k.replace('_', ' ')} {v / wall:.0%}" for k, v in shares if v > 0)
    rows["report"] = str(result.outputs / "report.html")
    rows["model"] = result.model_address or str(result.outputs / "model")
    table(f"run {result.run_id}", rows)


if __name__ == "__main__":
    run_program(Arguments, main, default=from_recipe, description=__doc__ or "")
