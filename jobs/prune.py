"""How many factors the data want: prune a model that was trained with too many to the slots that it needs.

python jobs/prune.py --model outputs/latest --data data/grid --out outputs/pruned
python jobs/prune.py --model models:/flam-grid/1 --data s3://bucket/grid --out outputs/pruned --tolerance_db 0.2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/prune.py` puts only jobs/ on the path

import flam_core
from flam_core.config_evaluation import EvaluationConfig
from flam_core.data.quarantine import MAX_BAD_SHARE
from flam_core.errors import SettingsError
from flam_core.evaluation.prune import prune
from flam_core.saved_model import save_model
from services.console import run_program, table
from services.training.data import open_sources
from services.training.held_out import clips_of


@dataclass(frozen=True)
class Arguments:
    """What `jobs/prune.py` takes."""

    model: str
    """models:/NAME/VERSION, models:/NAME@ALIAS, or the folder of a model or a run."""
    data: str
    """The data set: a folder or s3://bucket/prefix. Its split `val` decides; `test` stays unseen."""
    out: Path = Path("outputs/pruned")
    """Folder for the smaller model."""
    tolerance_db: float = 0.1
    """How far PSNR may fall, one step ahead and over the rollout."""
    seed: int = 0
    """Of the shuffling and the bootstrap."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of clips that may be quarantined; beyond it the job stops with the list."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.tolerance_db < 0:
            raise SettingsError(f"tolerance_db = {self.tolerance_db}", fix="It must not be negative.")


def main(arguments: Arguments) -> None:
    """Load, prune, save."""
    (source,) = open_sources([(arguments.data, 1.0)], max_bad_share=arguments.max_bad_share)
    model = flam_core.load(arguments.model)
    sizes = arguments.evaluation
    frames = sizes.context + sizes.horizon
    clips = clips_of(source, "val", frames, sizes.clips, on_broken=lambda clip: print(f"left out: {clip}", flush=True))
    found = prune(model, clips, sizes, arguments.seed, arguments.tolerance_db)
    kept = ", ".join(map(str, found.kept))
    card = f"# Pruned FLAM\n\nSlots {kept} of the {model.factors} of `{arguments.model}`, by `{arguments.data}`.\n"
    save_model(found.model, arguments.out, card)
    rows = {"factors": f"{model.factors} given, {len(found.used)} in use, {len(found.kept)} kept: {kept}"}
    rows |= {key: f"{found.before[key]:.2f} dB before, {found.after[key]:.2f} after" for key in found.before}
    table("prune", rows | {"model": str(arguments.out)})


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
