"""How far a rollout holds: PSNR over up to 50 steps, beside that of the last known frame."""

from __future__ import annotations

import numpy as np
import torch

from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.context import BATCH, Context
from flam_core.evaluation.image import frame_mse, psnr
from flam_core.evaluation.measure import Findings, Measure

STEPS = (1, 2, 5, 10, 20, 30, 40, 50)
"""Steps that are reported, as far as `evaluation.long_horizon` and the clips go."""


@torch.inference_mode()
def _run(context: Context) -> Findings:
    config = context.config
    lengths = sorted((len(clip.frames) for clip in context.long_clips), reverse=True)
    if len(lengths) < 2:
        raise DataError("fewer than 2 clips are given", fix="Ingest more held-out clips.")
    possible = min(config.long_horizon, lengths[1] - config.context)  # two clips at least must be as long
    steps = [k for k in STEPS if k <= possible]
    if not steps:
        raise DataError(
            f"fewer than 2 clips have more than {config.context} frames, which are given", fix="Ingest longer clips."
        )
    seen = context.observe(context.cut(context.long_clips, config.context + steps[-1])[: config.long_clips])
    errors: dict[str, list[np.ndarray]] = {"psnr": [], "copy_psnr": []}
    for start in range(0, len(seen.clips), BATCH):
        clip = seen.frames[start : start + BATCH].to(context.device)
        actions = seen.actions[start : start + BATCH].to(context.device)
        given, truth = clip[:, : config.context], clip[:, config.context :].float() / 255
        predicted = context.model.rollout(given, actions, config.rollout).float().clamp(0, 1)
        errors["psnr"].append(frame_mse(predicted, truth).double().cpu().numpy())
        errors["copy_psnr"].append(frame_mse(given[:, -1:].float() / 255, truth).double().cpu().numpy())
    bootstrap = context.bootstrap(seen.clusters)
    estimates = {}
    for name, parts in errors.items():
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise TrainingFailed(
                "frames of the long rollout are not finite", fix="The weights have diverged: use an older checkpoint."
            )
        draws = psnr(bootstrap.ratio(found))
        estimates |= {f"horizon/{name}@{k}": bootstrap.estimate(draws[:, k - 1]) for k in steps}
    notes = ()
    wanted = [k for k in STEPS if k <= config.long_horizon]
    if steps != wanted:
        notes = (f"The horizon curve ends at step {steps[-1]}, not {wanted[-1]}: clips have {lengths[1]} frames.",)
    return Findings(estimates, notes=notes)


HORIZON = Measure("horizon", "horizon curve", (), _run)
