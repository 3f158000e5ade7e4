"""How well a model predicts the future of held-out clips, against references (flam-spec: protocol).

Latent actions are inferred from the true frames (posterior mean); the future is then rolled out from the first frames.
These predictions of the same frames are measured:

- `rollout`: the model's, with the inferred latent actions;
- `shuffled`: the same, but each clip is given the latent actions of another clip. As good as `rollout`: the latent
  actions do nothing;
- `shuffled_time`: each clip is given its own latent actions of other steps;
- `zero`, `random`: latent actions that are zero, or drawn from the fixed prior;
- `prior`: latent actions drawn step by step from the learned prior, given what was predicted so far;
- `copy`: the last known frame, unchanged. As good as `rollout`: the model has not learned to move anything;
- `mean`: the mean of all train frames;
- `ceiling`: the true frame through the tokenizer and back, which no prediction can be expected to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flam_core.errors import TrainingFailed
from flam_core.evaluation.context import BATCH, Context, Observed, derangement
from flam_core.evaluation.image import frame_mse, frame_ssim, psnr
from flam_core.evaluation.measure import Findings, Measure
from flam_core.evaluation.stats import Bootstrap, Estimate, flat

CONTROLS = ("shuffled", "shuffled_time", "zero", "random", "prior", "copy", "mean")
"""What `rollout` is compared with, where it can be: `delta_psnr/` of each."""
SOURCES = ("rollout", *CONTROLS, "ceiling")
EXAMPLES = 4
"""Clips that are kept for pictures."""


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """What `evaluate_rollouts` measured, and M <= EXAMPLES clips to look at.

    estimates: as in docs/metrics.md. notes: which controls are missing and why. clips: how many were measured.
    context: true frames that a rollout started from.
    predicted: uint8 [N, horizon, H, W, 3] of "rollout", "shuffled" and "ceiling", all clips, without the known frames.
    errors: mean squared errors float64 [N, horizon] of each source. ids, episodes: of the N clips.
    worst: numbers of the (up to EXAMPLES) clips that "rollout" does worst on, the worst first; worst_truth: uint8
    [M, T, H, W, 3], their true frames.
    truth: uint8 [M, T, H, W, 3], T = context + horizon.
    masks: float32 [M, T, K, P], the factorizer's on the true frames (they sum to 1 over K; P is a square grid of
    patches, row by row), or None for a model without slots or with one, whose mask is everything.
    """

    estimates: Mapping[str, Estimate]
    notes: tuple[str, ...]
    clips: int
    context: int
    predicted: Mapping[str, np.ndarray]
    truth: np.ndarray
    masks: np.ndarray | None
    errors: Mapping[str, np.ndarray]
    ids: tuple[str, ...]
    episodes: tuple[str, ...]
    worst: tuple[int, ...]
    worst_truth: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """Means and standard errors by key."""
        return flat(self.estimates)

    @property
    def horizon(self) -> int:
        """Steps of a rollout."""
        return self.truth.shape[1] - self.context

    @property
    def prediction(self) -> np.ndarray:
        """The model's frames uint8 [M, T, H, W, 3]; the first `context` are the given, true ones. So below."""
        return self._film("rollout")

    @property
    def worst_prediction(self) -> np.ndarray:
        """The model's frames of the clips `worst`, uint8 [M, T, H, W, 3]."""
        shown = self.predicted["rollout"][list(self.worst)]
        return np.concatenate([self.worst_truth[:, : self.context], shown], axis=1)

    @property
    def shuffled(self) -> np.ndarray:
        """Its frames with another clip's latent actions."""
        return self._film("shuffled")

    @property
    def ceiling(self) -> np.ndarray:
        """The tokenizer's frames."""
        return self._film("ceiling")

    def _film(self, source: str) -> np.ndarray:
        shown = self.predicted[source][: len(self.truth)]
        return np.concatenate([self.truth[:, : self.context], shown], axis=1)


@torch.inference_mode()
def evaluate_rollouts(context: Context) -> RolloutResult:
    """Roll out every held-out clip and compare with what happened.

    Equal seeds give equal numbers but for rounding. The model is used in the mode it is in. Raises DataError for fewer
    than 2 clips that are long enough, TrainingFailed if a prediction is not finite.
    """
    seen = context.held_out
    actions, notes = _controlled_actions(context, seen)
    mse: dict[str, list[Tensor]] = {}
    ssim: dict[str, list[Tensor]] = {}
    kept: dict[str, list[Tensor]] = {"rollout": [], "shuffled": [], "ceiling": []}
    known = context.config.context
    for start in range(0, len(seen.clips), BATCH):
        part = slice(start, start + BATCH)
        truth = seen.frames[part, known:].to(context.device).float() / 255
        for source, frames in _predictions(context, seen, actions, part).items():
            shown = frames.float().clamp(0, 1)
            mse.setdefault(source, []).append(frame_mse(shown, truth).cpu())
            ssim.setdefault(source, []).append(frame_ssim(shown, truth).cpu())
            if source in kept:
                kept[source].append((shown * 255).round().to(torch.uint8).cpu())
    errors, similarity = ({s: torch.cat(v).double().numpy() for s, v in values.items()} for values in (mse, ssim))
    for source, values in errors.items():
        if not np.isfinite(values).all():
            raise TrainingFailed(
                f"the model's {source} frames are not finite", fix="Its weights have diverged: use an older checkpoint."
            )
    if len({clip.episode for clip in seen.clips}) < 2:
        notes.append("Standard errors are over clips, which are all of one episode: they may be too small.")
    worst = np.argsort(-errors["rollout"].mean(axis=1), kind="stable")[:EXAMPLES]
    masks = None if seen.masks is None or seen.masks.shape[2] < 2 else seen.masks[:EXAMPLES].numpy()
    return RolloutResult(
        estimates=_estimates(context.bootstrap(seen.clusters), errors, similarity),
        notes=tuple(notes),
        clips=len(seen.clips),
        context=known,
        predicted={source: torch.cat(parts).numpy() for source, parts in kept.items()},
        truth=seen.frames[:EXAMPLES].numpy(),
        masks=masks,
        errors=errors,
        ids=tuple(clip.id for clip in seen.clips),
        episodes=tuple(seen.clusters),
        worst=tuple(int(i) for i in worst),
        worst_truth=seen.frames[worst].numpy(),
    )


def _controlled_actions(context: Context, seen: Observed) -> tuple[dict[str, Tensor], list[str]]:
    """The latent actions [N, T - 1, M, A] of each source that is rolled out with given ones, and what is missing."""
    # Transitions between given frames are known: only `shuffled`, which takes whole sequences, tampers with them.
    own, known = seen.actions, context.config.context - 1
    clips, steps = own.shape[0], own.shape[1] - known
    sources = {"rollout": own, "shuffled": own[torch.from_numpy(derangement(clips, context.rng(0)))]}
    notes = [] if context.mean_frame is not None else ["No mean-frame baseline: there are no train clips."]
    if context.latent == "none":
        notes.append("No zero, random, prior and shuffled_time controls: the model has no latent actions.")
        return sources, notes
    if steps > 1:
        rng = context.rng(2)
        order = torch.from_numpy(np.stack([known + derangement(steps, rng) for _ in range(clips)]))
        sources["shuffled_time"] = torch.cat([own[:, :known], own[torch.arange(clips)[:, None], order]], dim=1)
    else:
        notes.append("No shuffled_time control: a rollout of one step has no other steps.")
    drawn = context.model.sample_actions((clips, steps, own.shape[2]), context.generator(3)).float().cpu()
    sources["zero"] = torch.cat([own[:, :known], torch.zeros_like(own[:, known:])], dim=1)
    sources["random"] = torch.cat([own[:, :known], drawn], dim=1)
    if context.latent == "true":
        notes.append("No prior control: the model is given true actions and learns no prior.")
    return sources, notes


def _predictions(context: Context, seen: Observed, actions: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
    """Frames float [B, horizon, H, W, 3] of every source, for a part of the clips."""
    model, config = context.model, context.config
    clip = seen.frames[part].to(context.device)
    given = clip[:, : config.context]
    shape = (len(clip), config.horizon, *clip.shape[2:])
    found = {
        source: model.rollout(given, latent[part].to(context.device), config.rollout)
        for source, latent in actions.items()
    }
    if context.latent in ("gaussian", "vq"):
        generator = context.generator(4 + part.start)
        found["prior"] = model.imagine(given, config.horizon, generator, config.rollout)[0]
    found["copy"] = (given[:, -1:].float() / 255).expand(shape)
    if context.mean_frame is not None:
        found["mean"] = torch.from_numpy(context.mean_frame).float().to(context.device).expand(shape)
    found["ceiling"] = model.decode(model.encode(clip[:, config.context :]))
    return found


def _estimates(
    bootstrap: Bootstrap, errors: Mapping[str, np.ndarray], similarity: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
    """Estimates by key from per-frame errors and similarities, both float64 [N, horizon], of each source.

    The error is pooled over clips before the logarithm. A mean of per-clip PSNRs would be ruled by the clips in which
    nothing moves: there `copy` has no error at all, hence an infinite PSNR.
    """
    draws: dict[str, np.ndarray] = {}
    for source in SOURCES:
        if source in errors:
            draws[f"{source}/psnr"] = _with_total(psnr, bootstrap.ratio(errors[source]))
            draws[f"{source}/ssim"] = _with_total(lambda values: values, bootstrap.ratio(similarity[source]))
    for control in CONTROLS:
        if control in errors:
            draws[f"delta_psnr/{control}"] = draws["rollout/psnr"] - draws[f"{control}/psnr"]
    estimates = {}
    for key, columns in draws.items():
        estimates[key] = bootstrap.estimate(columns[:, 0])
        estimates |= {f"{key}@{k}": bootstrap.estimate(columns[:, k]) for k in range(1, columns.shape[1])}
    return estimates


def _with_total(of: Callable[[np.ndarray], np.ndarray], per_step: np.ndarray) -> np.ndarray:
    """`of` the means [R, horizon] of each resample, with that over all steps in front: [R, 1 + horizon]."""
    return of(np.concatenate([per_step.mean(axis=1, keepdims=True), per_step], axis=1))


def _run(context: Context) -> Findings:
    result = context.shared(evaluate_rollouts)
    return Findings(result.estimates, notes=result.notes)


ROLLOUT = Measure("rollout", "rollouts", (), _run)
