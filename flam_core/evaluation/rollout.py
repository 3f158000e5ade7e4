"""How well a model predicts the future of held-out clips, against three references (flam-spec: protocol).

Latent actions are inferred from the true frames (posterior mean); the future is then rolled out from the first frames.
Four predictions of the same frames are measured:

- `rollout`: the model's, with the inferred latent actions;
- `shuffled`: the same, but each clip is given the latent actions of another clip. As good as `rollout`: the latent
  actions do nothing;
- `copy`: the last known frame, unchanged. As good as `rollout`: the model has not learned to move anything;
- `ceiling`: the true frame through the tokenizer and back, which no prediction can be expected to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flam_core.config import EvaluationConfig
from flam_core.errors import DataError, TrainingFailed
from flam_core.model.flam import Flam

SOURCES = ("rollout", "shuffled", "copy", "ceiling")
EXAMPLES = 4
"""Clips that are kept for pictures."""
RESAMPLES = 200
"""Bootstrap resamples of the clips behind each standard error."""
PSNR_CAP = 100.0
"""dB; a prediction without any error has no finite PSNR, and JSON has no infinity."""


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """What `evaluate_rollouts` measured, and M <= EXAMPLES clips to look at.

    metrics: as in docs/metrics.md. clips: how many were measured. context: true frames that a rollout started from.
    truth, prediction, shuffled, ceiling: uint8 [M, T, H, W, 3], T = context + horizon; the first `context` frames are
    the given, true ones in each.
    masks: float32 [M, T, K, P], the factorizer's on the true frames (they sum to 1 over K; P is a square grid of
    patches, row by row), or None for a model with one factor, whose mask is everything.
    """

    metrics: dict[str, float]
    clips: int
    context: int
    truth: np.ndarray
    prediction: np.ndarray
    shuffled: np.ndarray
    ceiling: np.ndarray
    masks: np.ndarray | None

    @property
    def horizon(self) -> int:
        """Steps of a rollout."""
        return self.truth.shape[1] - self.context


@torch.inference_mode()
def evaluate_rollouts(
    model: Flam, frames_u8: Tensor, config: EvaluationConfig, seed: int, batch: int = 16
) -> RolloutResult:
    """Roll out every clip and compare with what happened.

    frames_u8: uint8 [N, context + horizon, H, W, 3] on any device, N >= 2. seed: of the shuffling and the bootstrap;
    equal seeds give equal numbers, whatever `batch` (clips at a time) is, but for rounding. The model is used in the
    mode it is in.

    Raises DataError for fewer than 2 clips or clips of another length, TrainingFailed if a prediction is not finite.
    """
    clips, frames = frames_u8.shape[:2]
    context, horizon = config.context, config.horizon
    if clips < 2:
        raise DataError(
            f"evaluation has {clips} clip(s), and the control needs another clip's latent actions",
            fix="Give at least 2 clips.",
        )
    if frames != context + horizon:
        raise DataError(
            f"clips have {frames} frames, not context {context} + horizon {horizon}", fix="Cut them to that length."
        )
    device = next(model.parameters()).device
    parts = [slice(start, min(start + batch, clips)) for start in range(0, clips, batch)]

    actions, masks = [], []
    for part in parts:
        slots, part_masks = model.slots(model.encode(frames_u8[part].to(device)))
        actions.append(model.infer_actions(slots))
        masks.append(part_masks[: max(0, EXAMPLES - part.start)].float().cpu())
    latent = torch.cat(actions)
    other = latent[torch.from_numpy(derangement(clips, np.random.default_rng((seed, 0)))).to(device)]

    mse: dict[str, list[Tensor]] = {source: [] for source in SOURCES}
    ssim: dict[str, list[Tensor]] = {source: [] for source in SOURCES}
    examples: dict[str, list[Tensor]] = {source: [] for source in SOURCES}
    for part in parts:
        clip = frames_u8[part].to(device)
        given, truth = clip[:, :context], clip[:, context:].float() / 255
        predictions = {
            "rollout": model.rollout(given, latent[part], config.rollout),
            "shuffled": model.rollout(given, other[part], config.rollout),
            "copy": (given[:, -1:].float() / 255).expand_as(truth),
            "ceiling": model.decode(model.encode(clip[:, context:])),
        }
        for source, prediction in predictions.items():
            shown = prediction.float().clamp(0, 1)
            mse[source].append((shown - truth).square().mean(dim=(2, 3, 4)).cpu())
            ssim[source].append(frame_ssim(shown, truth).cpu())
            keep = max(0, EXAMPLES - part.start)
            examples[source].append((shown[:keep] * 255).round().to(torch.uint8).cpu())

    metrics: dict[str, float] = {}
    for source in SOURCES:
        errors, similarity = (torch.cat(values[source]).double().numpy() for values in (mse, ssim))
        if not np.isfinite(errors).all():
            raise TrainingFailed(
                f"the model's {source} frames are not finite", fix="Its weights have diverged: use an older checkpoint."
            )
        metrics |= _summary(source, errors, similarity, seed)

    truth_u8 = frames_u8[:EXAMPLES].cpu()
    pictures = {
        source: torch.cat([truth_u8[:, :context], torch.cat(examples[source])], dim=1).numpy() for source in SOURCES
    }
    all_masks = torch.cat(masks).numpy()
    return RolloutResult(
        metrics=metrics,
        clips=clips,
        context=context,
        truth=truth_u8.numpy(),
        prediction=pictures["rollout"],
        shuffled=pictures["shuffled"],
        ceiling=pictures["ceiling"],
        masks=all_masks if all_masks.shape[2] > 1 else None,
    )


def psnr(mse: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, at most PSNR_CAP, of mean squared errors of values in [0, 1]."""
    return -10 * np.log10(np.maximum(mse, 10 ** (-PSNR_CAP / 10)))


def frame_ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """SSIM [B, S] of frames float [B, S, H, W, 3] in [0, 1] (Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5)."""
    b, s = truth.shape[:2]
    x, y = (frames.flatten(0, 1).permute(0, 3, 1, 2).contiguous() for frames in (prediction, truth))
    values = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    return torch.as_tensor(values).reshape(b, s)


def derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation int64 [count] that moves everything, count >= 2: one random cycle through all."""
    order = rng.permutation(count)
    moved = np.empty(count, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def _summary(source: str, mse: np.ndarray, ssim: np.ndarray, seed: int) -> dict[str, float]:
    """Metrics of one source from per-frame errors and similarities, both float64 [N, horizon].

    The error is pooled over clips before the logarithm. A mean of per-clip PSNRs would be ruled by the clips in which
    nothing moves: there `copy` has no error at all, hence an infinite PSNR.
    """
    clips, horizon = mse.shape
    draws = np.random.default_rng((seed, 1)).integers(clips, size=(RESAMPLES, clips))
    spread = psnr(mse[draws].mean(axis=1)).std(axis=0, ddof=1)
    per_step = psnr(mse.mean(axis=0))
    metrics = {f"{source}/psnr": float(psnr(mse.mean())), f"{source}/ssim": float(ssim.mean())}
    for k in range(horizon):
        metrics[f"{source}/psnr@{k + 1}"] = float(per_step[k])
        metrics[f"{source}/psnr_se@{k + 1}"] = float(spread[k])
        metrics[f"{source}/ssim@{k + 1}"] = float(ssim[:, k].mean())
    return metrics
