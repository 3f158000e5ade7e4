"""What follows training: evaluation on held-out episodes, the report, the model's folder, the registered version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flam_core.data.quarantine import BadClip
from flam_core.errors import TrainingFailed
from flam_core.evaluation.evaluate import Evaluation
from flam_core.evaluation.report import write_report
from flam_core.learning.trainer import load_trained
from flam_core.model import Flam
from flam_core.saved_model import save_model
from services.registry import register
from services.storage import write_bytes
from services.tracking.run import TrackedRun
from services.tracking.server import RunInfo
from services.training import checkpoints
from services.training.broken import add_broken
from services.training.held_out import evaluate_on
from services.training.job import KEPT_FOR_RESUME, Finished

if TYPE_CHECKING:
    from services.training.prepare import Prepared


def finish(prepared: Prepared, tracking: RunInfo, outputs: Path) -> Finished:
    """Evaluate the run's newest checkpoint, write `outputs` and register the model. Doing it again changes nothing.

    Raises TrainingFailed if there is no checkpoint, and what evaluation and registry raise.
    """
    config = prepared.config
    saved = checkpoints.newest(prepared.run)
    if saved is None:
        raise TrainingFailed(f"run {prepared.run} has no checkpoint", fix="Run the same command again.")
    device = torch.device("cuda" if prepared.settings.gpu and torch.cuda.is_available() else "cpu")
    model = Flam(config.tokenizer, config.model)
    load_trained(model, saved)
    model.to(device).eval()
    broken: list[BadClip] = []
    measured = evaluate_on(model, prepared.sources[0], config.evaluation, config.seed, on_broken=broken.append)
    add_broken(prepared.run, prepared.sources[0], broken, prepared.settings.max_bad_share)
    info = {
        "run": prepared.run_id,
        "recipe": config.recipe,
        "data set": f"{prepared.manifest.name} ({prepared.manifest.source})",
        "episodes": ", ".join(f"{k} {v}" for k, v in prepared.manifest.episodes.items()),
        "steps": f"{config.tokenizer_stage.steps} tokenizer + {config.flam_stage.steps} FLAM",
        "weights": f"{_count(model.tokenizer)} tokenizer + {_count(model.dynamics)} FLAM",
        "factors": str(config.model.factors),
        "latent action": f"{config.model.latent}, {config.model.action_dim} per factor",
        "seed": str(config.seed),
    }
    write_report(outputs, measured.rollouts, measured.metrics, info, measured.notes, measured.estimates)
    save_model(model.cpu(), outputs / "model", _card(prepared, measured))
    _point_latest(outputs)
    if not prepared.run.local:
        for file in sorted(outputs.rglob("*")):
            if file.is_file():
                write_bytes(prepared.run / str(file.relative_to(outputs)), file.read_bytes())
    tracked = TrackedRun(tracking)
    tracked.summary(measured.metrics)
    # By default the run's folder is the outputs' too. Checkpoints are too big to go through an MLflow server.
    tracked.artifacts(outputs, "report", leave_out=KEPT_FOR_RESUME)
    address = None
    if prepared.settings.register:
        name = f"flam-{prepared.data_name}"
        tags = {
            "config_sha256": config.sha256(),
            "manifest_sha256": prepared.manifest.sha256,
            "sample_digest": saved.meta["consumed"],
            **{key.replace("@", "_at_"): f"{measured.metrics[key]:.4f}" for key in _TAGGED if key in measured.metrics},
        }
        example = np.zeros((1, 2, *prepared.manifest.frame_size, 3), dtype=np.uint8)
        address = f"models:/{name}/{register(tracking, name, outputs / 'model', example, tags)}"
    return Finished(outputs, measured.metrics, address)


_TAGGED = (
    *("rollout/psnr@1", "rollout/psnr@10", "copy/psnr@1", "copy/psnr@10", "ceiling/psnr"),
    *("dci/d", "dci/c", "dci/i", "action_probe/visible_accuracy", "action_probe/others_gain", "leakage", "slots/used"),
)
"""Of the many metrics, those that a version's tags and card show."""


def _point_latest(outputs: Path) -> None:
    """Make `outputs/latest` point at this run, without a moment in which it points nowhere."""
    link = outputs.parent / "latest"
    fresh = outputs.parent / f".latest-{outputs.name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(outputs.name)
    fresh.replace(link)


def _count(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def _card(prepared: Prepared, measured: Evaluation) -> str:
    """The model card: what it is, from what, how good, how to use it."""
    config, manifest = prepared.config, prepared.manifest
    rows = "\n".join(f"| `{key}` | {measured.metrics[key]:.4f} |" for key in _TAGGED if key in measured.metrics)
    name = f"flam-{prepared.data_name}"
    return f"""# {name}

A factored latent action world model (FLAM) with {config.model.factors} factors and {config.model.latent} latent
actions, trained without action labels by the run `{prepared.run_id}`.

- Data: {manifest.name}: {manifest.source}; licence {manifest.licence}; {manifest.frames} frames of
  {manifest.frame_size[0]}x{manifest.frame_size[1]}; manifest sha256 `{manifest.sha256}`
- Settings: recipe `{config.recipe}`, config sha256 `{config.sha256()}`, seed {config.seed}

```python
import flam_core
model = flam_core.load("models:/{name}@candidate")
```

Measured on held-out episodes (docs/metrics.md says what each number means; the run's metrics.json has all of them):

| metric | value |
|---|---|
{rows}

The settings in full:

```json
{json.dumps({"tokenizer": config.tokenizer.__dict__, "model": config.model.__dict__}, indent=2)}
```
"""
