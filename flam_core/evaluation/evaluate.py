"""Everything that is measured on held-out clips, in one call: rollouts, and correspondence where the truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from flam_core.config import EvaluationConfig
from flam_core.errors import DataError
from flam_core.evaluation.dci import DCIResult, dci
from flam_core.evaluation.rollout import RolloutResult, evaluate_rollouts
from flam_core.model.flam import Flam


@dataclass(frozen=True, eq=False)
class HeldOutClip:
    """A clip that the model was not trained on (but for the probes' train split), with what is known of it.

    frames: uint8 [T, H, W, 3], RGB. positions: float32 [T, A, 2], (x, y) in [0, 1] of the frame, NaN while an entity is
    not in view. actions: float32 [T, A, width], what each entity was told to do. None where there is no ground truth.
    """

    id: str
    episode: str
    frames: np.ndarray
    positions: np.ndarray | None = None
    actions: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """metrics: as in docs/metrics.md. correspondence: None, with the reason in `notes`, if it could not be measured."""

    metrics: dict[str, float]
    rollouts: RolloutResult
    correspondence: DCIResult | None
    notes: tuple[str, ...]


def evaluate(
    model: Flam,
    clips: Sequence[HeldOutClip],
    probe_clips_train: Sequence[HeldOutClip],
    probe_clips_test: Sequence[HeldOutClip],
    config: EvaluationConfig,
    seed: int,
) -> Evaluation:
    """Measure a model on the first `context + horizon` frames of held-out clips.

    The first `config.clips` clips that are long enough are rolled out; the first `config.probe_clips` of each probe
    split that are long enough and have positions are probed. The model runs on its own device in evaluation mode; the
    mode of each of its modules is restored.

    Raises DataError if no clip, or only one, is long enough, TrainingFailed if the model's numbers are not finite.
    """
    frames = config.context + config.horizon
    usable = [clip for clip in clips if len(clip.frames) >= frames][: config.clips]
    if not usable:
        found = ", ".join(str(n) for n in sorted({len(clip.frames) for clip in clips})) or "no clips at all"
        raise DataError(
            f"no clip has the {frames} frames of context {config.context} + horizon {config.horizon}; lengths: {found}",
            fix="Lower evaluation.horizon, or ingest longer clips.",
        )
    with _evaluating(model), torch.inference_mode():
        stack = torch.from_numpy(np.stack([clip.frames[:frames] for clip in usable]))
        rollouts = evaluate_rollouts(model, stack, config, seed)
        try:
            train = _slots_and_positions(model, "train", probe_clips_train, frames, config.probe_clips)
            test = _slots_and_positions(model, "test", probe_clips_test, frames, config.probe_clips)
            correspondence = dci(*train, *test)
        except DataError as error:
            # Most videos have no ground truth: the rollouts are worth having without it.
            return Evaluation(dict(rollouts.metrics), rollouts, None, (f"No DCI: {error.what}.",))
    return Evaluation(rollouts.metrics | correspondence.metrics, rollouts, correspondence, ())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again (a frozen tokenizer differs from the rest)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _slots_and_positions(
    model: Flam, split: str, clips: Sequence[HeldOutClip], frames: int, limit: int, batch: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Slots float32 [N, K, D] and positions float32 [N, A, 2] of all frames of the clips, cut to `frames`.

    Raises DataError if no clip has positions and is long enough, or clips differ in the number of entities.
    """
    known = [(clip.frames[:frames], clip.positions[:frames]) for clip in clips if clip.positions is not None]
    known = [pair for pair in known if len(pair[0]) == frames][:limit]
    if not known:
        raise DataError(f"no {split} clip has ground-truth positions and {frames} frames", fix="Ingest ground truth.")
    if len(entities := {positions.shape[1] for _, positions in known}) > 1:
        raise DataError(
            f"{split} clips have different numbers of entities: {sorted(entities)}", fix="Probe one data set at a time."
        )
    device = next(model.parameters()).device
    slots = []
    for start in range(0, len(known), batch):
        part = np.stack([clip_frames for clip_frames, _ in known[start : start + batch]])
        slots.append(model.slots(model.encode(torch.from_numpy(part).to(device)))[0].float().cpu())
    return torch.cat(slots).flatten(0, 1).numpy(), np.concatenate([positions for _, positions in known])
