"""What one latent action does: replace it at one step, keep the others, and compare the two predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flam_core.errors import DataError
from flam_core.evaluation.context import BATCH, Context, Observed, derangement
from flam_core.evaluation.correspondence import entity_of

MOMENTS = 2
"""Steps of a clip at which latent actions are replaced, evenly spread."""
REACH = 1.5
"""An entity's reach in x and in y, in its own largest steps, and at least in patches: nothing finer can be drawn."""
LARGEST_STEP = 95
"""Percentile of an entity's steps that counts as its largest: a reset is no step."""
MIN_STEP = 1e-3
"""Share of the frame's side: less than this is no movement."""


@dataclass(frozen=True, eq=False)
class Interventions:
    """R = moments x clips trials of each of M latent actions. All numbers are means over the pixels of a frame.

    clusters: of each trial, for the bootstrap. error: float64 [R], squared error of the prediction. replaced_error:
    [R, M], with latent action m replaced. change: [R, M], squared difference of the two predictions. outside_entity:
    [R, M], the part of it that lies beyond the reach of the entity that m is for, NaN where there is none or it is not
    in view. outside_mask: [R, M], the part in patches that slot m wins neither in the true frame nor in either
    prediction; None without slots.
    """

    clusters: tuple[str, ...]
    error: np.ndarray
    replaced_error: np.ndarray
    change: np.ndarray
    outside_entity: np.ndarray
    outside_mask: np.ndarray | None


@torch.inference_mode()
def intervene(context: Context) -> Interventions:
    """Replace every latent action of the held-out clips, one at a time, at MOMENTS steps, by `config.replacement`.

    Raises DataError if there are fewer than 2 clips.
    """
    seen = context.held_out
    try:
        entities = entity_of(context)
    except DataError:
        entities = {}  # the rest needs none; who asks for them is told why there are none
    first, last = context.config.context - 1, seen.actions.shape[1] - 1
    moments = sorted({round(float(t)) for t in np.linspace(first, last, MOMENTS + 2)[1:-1]})
    grid = _grid(context)
    reach = _reach(seen, entities, grid)
    parts = []
    for t in moments:
        replacement = _replacement(context, seen, t)
        for start in range(0, len(seen.clips), BATCH):
            part = slice(start, start + BATCH)
            parts.append(_trial(context, seen, replacement, reach, t, part))
    error, replaced, change, outside, in_mask = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Interventions(
        clusters=tuple(seen.clusters * len(moments)),
        error=error,
        replaced_error=replaced,
        change=change,
        outside_entity=outside,
        outside_mask=None if seen.masks is None else in_mask,
    )


def _grid(context: Context) -> int:
    """Patches along a side."""
    seen = context.held_out
    if seen.masks is not None:
        return round(seen.masks.shape[-1] ** 0.5)
    return round(context.model.encode(seen.frames[:1, :1].to(context.device)).shape[2] ** 0.5)


def _reach(seen: Observed, entities: dict[int, int], grid: int) -> dict[int, tuple[int, float]]:
    """The entity of each latent action and how far it reaches, in shares of the frame's side."""
    if seen.positions is None:
        return {}
    found = {}
    for m, entity in entities.items():
        steps = np.sqrt(np.square(np.diff(seen.positions[:, :, entity], axis=1)).sum(axis=-1))
        moved = steps[np.isfinite(steps) & (steps > MIN_STEP)]
        if len(moved):
            found[m] = (entity, REACH * max(float(np.percentile(moved, LARGEST_STEP)), 1 / grid))
    return found


def _replacement(context: Context, seen: Observed, t: int) -> Tensor:
    """What replaces the latent actions of transition t: [N, M, A]."""
    own = seen.actions[:, t]
    if context.config.replacement == "zero":
        return torch.zeros_like(own)
    if context.config.replacement == "prior":
        return context.model.sample_actions(tuple(own.shape[:2]), context.generator(1000 + t)).float().cpu()
    return own[torch.from_numpy(derangement(len(own), context.rng(1000 + t)))]


def _trial(
    context: Context,
    seen: Observed,
    replacement: Tensor,
    reach: dict[int, tuple[int, float]],
    t: int,
    part: slice,
) -> tuple[np.ndarray, ...]:
    """error, replaced_error, change, outside_entity and outside_mask of a part of the clips at transition t."""
    model = context.model
    first = max(0, t + 1 - model.dynamics.config.temporal_window)
    given = seen.frames[part, first : t + 1].to(context.device)
    actions = seen.actions[part, first : t + 1].to(context.device)
    truth = seen.frames[part, t + 1].to(context.device).float() / 255
    fresh = replacement[part].to(context.device)
    base = model.rollout(given, actions, context.config.rollout)[:, 0].float().clamp(0, 1)
    size = (base.shape[1], base.shape[2])
    z = model.encode(given) if seen.masks is not None else None
    winner_before = winner_base = None
    if z is not None and seen.masks is not None:
        winner_before = seen.masks[part, t].to(context.device).argmax(dim=1)
        winner_base = _winner(context, z, base)
    rows = torch.full((4, len(given), actions.shape[2]), torch.nan, dtype=torch.float64)
    for m in range(actions.shape[2]):
        changed = actions.clone()
        changed[:, -1, m] = fresh[:, m]
        other = model.rollout(given, changed, context.config.rollout)[:, 0].float().clamp(0, 1)
        difference = (other - base).square().mean(dim=-1)  # [B, H, W]
        rows[0, :, m] = (other - truth).square().mean(dim=(1, 2, 3)).double().cpu()
        rows[1, :, m] = difference.mean(dim=(1, 2)).double().cpu()
        if m in reach and seen.positions is not None:
            entity, radius = reach[m]
            centre = torch.from_numpy(seen.positions[part, t, entity]).to(difference)
            beyond = _distance(centre, size) > radius
            outside = (difference * beyond).mean(dim=(1, 2))
            rows[2, :, m] = outside.where(centre.isfinite().all(dim=1), torch.nan).double().cpu()
        if z is not None and winner_before is not None and winner_base is not None:
            mine = (winner_before == m) | (winner_base == m) | (_winner(context, z, other) == m)
            rows[3, :, m] = (difference * ~_enlarge(mine, size)).mean(dim=(1, 2)).double().cpu()
    error = (base - truth).square().mean(dim=(1, 2, 3)).double().cpu().numpy()
    return (error, *(rows[i].numpy() for i in range(4)))


def _winner(context: Context, z: Tensor, frame: Tensor) -> Tensor:
    """Which slot wins each patch, int64 [B, P], of a frame [B, H, W, 3] that follows features [B, t, P, C]."""
    after = context.model.encode((frame[:, None] * 255).round().to(torch.uint8))
    window = context.model.dynamics.config.temporal_window
    masks = context.model.slots(torch.cat([z, after], dim=1)[:, -window:])[1]
    assert masks is not None  # asked for models with slots alone
    return masks[:, -1].float().argmax(dim=1)


def _distance(centre: Tensor, size: tuple[int, int]) -> Tensor:
    """Distance [B, H, W] in x or in y, whichever is larger, of each pixel's centre from points (x, y) [B, 2].

    All in shares of the frame's side. Entities fill cells and patches are square: a round reach would cut corners.
    """
    height, width = size
    y = (torch.arange(height).to(centre) + 0.5) / height
    x = (torch.arange(width).to(centre) + 0.5) / width
    return torch.maximum((x - centre[:, 0, None, None]).abs(), (y[:, None] - centre[:, 1, None, None]).abs())


def _enlarge(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Patches [B, P] as pixels [B, H, W]."""
    grid = round(patches.shape[1] ** 0.5)
    square = patches.reshape(-1, grid, grid)
    return square.repeat_interleave(size[0] // grid, dim=1).repeat_interleave(size[1] // grid, dim=2)
