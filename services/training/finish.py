"""What follows training: evaluation on held-out episodes, the report, the model's folder, the registered version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flam_core.config_json import canonical_json, to_dict
from flam_core.data.quarantine import BadClip
from flam_core.errors import TrainingFailed
from flam_core.evaluation.evaluate import Evaluation
from flam_core.evaluation.reconstruction import evaluate_tokenizer
from flam_core.evaluation.report import write_report
from flam_core.evaluation.stats import error_key
from flam_core.learning.trained import load_trained
from flam_core.model import Flam
from flam_core.model.tokenizer import Tokenizer
from flam_core.saved_model import save_model, save_tokenizer
from flam_core.steering.microscope import MICROSCOPE_FILE
from services.registry import register
from services.storage import write_bytes
from services.tracking.run import TrackedRun
from services.tracking.server import RunInfo
from services.training import checkpoints
from services.training.broken import add_broken
from services.training.card import TAGGED, model_card
from services.training.explain import explain
from services.training.held_out import clips_of, evaluate_on
from services.training.job import KEPT_FOR_RESUME, Finished
from services.training.lineage import git_commit, hardware, seconds_used

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
    if config.flam_stage.steps == 0:
        return _finish_tokenizer(prepared, tracking, outputs, model.tokenizer)
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
    explained = explain(prepared, model, measured.metrics)
    links = {} if explained is None else {MICROSCOPE_FILE: "The action microscope: what each slot can be told to do"}
    write_report(outputs, measured.rollouts, measured.metrics, info, measured.notes, measured.estimates, links)
    lineage = _lineage(prepared, device)
    save_model(model.cpu(), outputs / "model", model_card(prepared, measured, lineage))
    for name in ("rollout.png", "failures.png", "slots.png"):  # the card shows them
        if (outputs / name).exists():
            shutil.copyfile(outputs / name, outputs / "model" / name)
    if explained is not None:
        explained.write(outputs)
    _publish(prepared, tracking, outputs, measured.metrics)
    address = None
    if prepared.settings.register:
        name = f"flam-{prepared.data_name}"
        tags = {
            "config_sha256": config.sha256(),
            "manifest_sha256": prepared.manifest.sha256,
            "sample_digest": saved.meta["consumed"],
            "evaluation": canonical_json(to_dict(config.evaluation)),
            **lineage,
            **_numbers(measured),
        }
        example = measured.rollouts.truth[:1, :2]
        address = f"models:/{name}/{register(tracking, name, outputs / 'model', example, tags)}"
    return Finished(outputs, measured.metrics, address)


def _lineage(prepared: Prepared, device: torch.device) -> dict[str, str]:
    seconds, of_workers = seconds_used(prepared.run)
    used = {"gpu_seconds": f"{of_workers:.0f}"} if device.type == "cuda" else {"worker_seconds": f"{of_workers:.0f}"}
    return {
        "git_commit": git_commit(),
        "seed": str(prepared.config.seed),
        "hardware": hardware(device),
        "seconds": f"{seconds:.0f}",
        **used,
    }


def _numbers(measured: Evaluation) -> dict[str, str]:
    """A version's tags: metrics, with their standard errors where there are some."""
    found = measured.metrics
    keys = [key for name in TAGGED for key in (name, error_key(name)) if key in found]
    return {key.replace("@", "_at_"): f"{found[key]:.4f}" for key in keys}


def _finish_tokenizer(prepared: Prepared, tracking: RunInfo, outputs: Path, tokenizer: Tokenizer) -> Finished:
    """What is left to do for a run of the first stage alone: nothing is registered."""
    config, source = prepared.config, prepared.sources[0]
    broken: list[BadClip] = []
    frames = config.evaluation.context + config.evaluation.horizon
    clips = clips_of(source, "test", frames, config.evaluation.clips, on_broken=broken.append)
    add_broken(prepared.run, source, broken, prepared.settings.max_bad_share)
    found, picture = evaluate_tokenizer(tokenizer, clips, config.seed)
    outputs.mkdir(parents=True, exist_ok=True)
    (outputs / "reconstruction.png").write_bytes(picture)
    (outputs / "metrics.json").write_text(json.dumps(found.metrics, indent=2, sort_keys=True) + "\n")
    card = f"# A tokenizer\n\nOf the run `{prepared.run_id}`, for `jobs/train.py --tokenizer_from`.\n"
    save_tokenizer(tokenizer.cpu(), outputs / "model", card)
    _publish(prepared, tracking, outputs, found.metrics)
    return Finished(outputs, found.metrics, None)


def _publish(prepared: Prepared, tracking: RunInfo, outputs: Path, metrics: Mapping[str, float]) -> None:
    """Bring the report to the run's folder or bucket, and to MLflow."""
    _point_latest(outputs)
    if not (prepared.run.local and Path(prepared.run.path).resolve() == outputs.resolve()):
        for file in sorted(outputs.rglob("*")):
            if file.is_file():
                write_bytes(prepared.run / str(file.relative_to(outputs)), file.read_bytes())
    tracked = TrackedRun(tracking)
    tracked.summary(metrics)
    # By default the run's folder is the outputs' too. Checkpoints are too big to go through an MLflow server.
    tracked.artifacts(outputs, "report", leave_out=KEPT_FOR_RESUME)


def _point_latest(outputs: Path) -> None:
    """Make `outputs/latest` point at this run, without a moment in which it points nowhere."""
    link = outputs.parent / "latest"
    fresh = outputs.parent / f".latest-{outputs.name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(outputs.name)
    fresh.replace(link)


def _count(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
