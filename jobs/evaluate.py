"""Evaluate a model on the held-out episodes of a data set and write its report.

python jobs/evaluate.py --model models:/flam-grid/1 --data data/grid --out outputs/check
python jobs/evaluate.py --model outputs/latest --data data/grid --evaluation.rollout frames
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/evaluate.py` puts only jobs/ on the path

import flam_core
from flam_core.config_evaluation import EvaluationConfig
from flam_core.data.quarantine import MAX_BAD_SHARE, BadClip, Quarantine
from flam_core.errors import SettingsError
from flam_core.evaluation.report import write_report
from services.console import run_program, table
from services.training.data import open_sources
from services.training.held_out import evaluate_on


@dataclass(frozen=True)
class Arguments:
    """What `jobs/evaluate.py` takes."""

    model: str
    """models:/NAME/VERSION, models:/NAME@ALIAS, or the folder of a model or a run."""
    data: str
    """The data set: a folder or s3://bucket/prefix."""
    out: Path = Path("outputs/evaluation")
    """Folder for report.html, metrics.json and the pictures."""
    split: Literal["test", "val"] = "test"
    """Which held-out episodes."""
    seed: int = 0
    """Of the shuffling and the bootstrap."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of clips that may be broken or quarantined; beyond it the job stops with the list."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def main(arguments: Arguments) -> None:
    """Load, measure, write."""
    (source,) = open_sources([(arguments.data, 1.0)], max_bad_share=arguments.max_bad_share)
    manifest = source.manifest
    model = flam_core.load(arguments.model)
    size = model.tokenizer.config.frame_size
    if manifest.frame_size != (size, size):
        raise SettingsError(
            f"{arguments.model} takes frames of {size}x{size}, data set {source.data} has {manifest.frame_size}",
            fix=f"Ingest the data with --size {size}.",
        )
    broken: list[BadClip] = []
    measured = evaluate_on(
        model, source, arguments.evaluation, arguments.seed, split=arguments.split, on_broken=broken.append
    )
    for clip in dict.fromkeys(broken):  # it may have been read for more than one measure
        print(f"left out: {clip}", flush=True)
    Quarantine(clips=(*source.quarantine.clips, *broken)).check(manifest, arguments.max_bad_share)
    info = {"model": arguments.model, "data set": manifest.name, "split": arguments.split, "seed": str(arguments.seed)}
    report = write_report(arguments.out, measured.rollouts, measured.metrics, info, measured.notes, measured.estimates)
    rows = {key: f"{measured.metrics[key]:.3f}" for key in _SHOWN if key in measured.metrics}
    table("evaluation", rows | {"report": str(report)})


_SHOWN = (
    *(f"{kind}/psnr@{step}" for step in (1, 10) for kind in ("rollout", "copy", "shuffled", "zero", "prior")),
    *("ceiling/psnr", "dci/d", "dci/c", "dci/i"),
    *("action_probe/visible_accuracy", "action_probe/others_gain", "leakage", "slots/used"),
)


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
