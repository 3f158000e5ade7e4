"""Train FLAM: both stages, evaluation, report, registered model.

    python jobs/train.py [recipe] [--field value ...]
    python jobs/train.py tiny --data data/grid --model.factors 8
    ray job submit --working-dir . -- python jobs/train.py multigrid --data s3://bucket/multigrid --gpu --workers 8

The same command again resumes. Recipes: tiny, smoke, multigrid. Errors end with the exit codes of docs/errors.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/train.py` puts only jobs/ on the path

from flam_core.config import Config
from flam_core.errors import SettingsError
from flam_core.recipes import get_recipe
from services.console import run_program, table
from services.training import RunResult, TrainSettings, prepare, train


@dataclass(frozen=True)
class Arguments:
    """What `jobs/train.py` takes."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = field(default_factory=TrainSettings)


def from_recipe(words: list[str]) -> Arguments:
    """Take the recipe's name off the front; without one it is that of the run to resume, else `tiny`."""
    if any(word.partition("=")[0] == "--recipe" for word in words):
        raise SettingsError("--recipe is not a flag", fix="Give the recipe as the first word: jobs/train.py tiny ...")
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    else:
        name = words[words.index("--resume") + 1].split("-")[0] if "--resume" in words[:-1] else "tiny"
    return Arguments(get_recipe(name))


def main(arguments: Arguments) -> None:
    """Check everything, then train."""
    prepared = prepare(arguments.config, arguments.settings)
    print(f"run {prepared.run_id}: {prepared.manifest.name}, {prepared.manifest.frames} frames", flush=True)
    show(train(prepared))


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
    rows["report"] = str(result.outputs / "report.html")
    rows["model"] = result.model_address or str(result.outputs / "model")
    table(f"run {result.run_id}", rows)


if __name__ == "__main__":
    run_program(Arguments, main, default=from_recipe, description=__doc__ or "")
