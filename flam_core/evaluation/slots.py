"""Which slots are in use: those whose latent action matters, or who claim what moves.

The number of them says how many factors the data have; a model may be pruned to them (`Flam.pruned`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch.nn.functional as F

from flam_core.errors import DataError
from flam_core.evaluation.context import Context, Observed
from flam_core.evaluation.correspondence import entity_of
from flam_core.evaluation.image import psnr
from flam_core.evaluation.interventions import intervene
from flam_core.evaluation.measure import Findings, Measure

MIN_EFFECT = 0.1
"""dB: a slot whose latent action costs less when replaced does not act."""
MIN_SHARE = 0.5
"""A slot claims what moves if it wins this share of an even split of the moving patches (1 / K) or more, and more of
them than of all patches: whoever wins the background wins the patches that things move onto."""
MOVING = 2 / 255
"""Mean absolute change of a patch's pixels from one frame to the next above which it moves."""


def _run(context: Context) -> Findings:
    seen = context.held_out
    assert seen.masks is not None  # the measure needs slots
    slots = seen.masks.shape[2]
    bootstrap = context.bootstrap(seen.clusters)
    moving, everything = won_patches(seen)
    shares, of_all = (bootstrap.ratio(won, won.sum(axis=1, keepdims=True)) for won in (moving, everything))
    estimates = {f"slots/{i}/mask_share": bootstrap.estimate(of_all[:, i]) for i in range(slots)}
    values, notes = {}, []
    claims = np.zeros(slots, dtype=bool)
    if np.isfinite(shares[0]).all():
        claims = (shares[0] >= MIN_SHARE / slots) & (shares[0] > of_all[0])
        estimates |= {f"slots/{i}/moving_share": bootstrap.estimate(shares[:, i]) for i in range(slots)}
    else:
        notes.append("No share of moving patches: nothing moves in these clips.")
    acts = np.zeros(slots, dtype=bool)
    if context.lacks("latent actions") is None:
        trials = context.shared(intervene)
        drawn = context.bootstrap(trials.clusters)
        cost = psnr(drawn.ratio(trials.error))[:, None] - psnr(drawn.ratio(trials.replaced_error))
        acts = cost[0] > MIN_EFFECT
        estimates |= {f"slots/{i}/effect_db": drawn.estimate(cost[:, i]) for i in range(slots)}
    try:
        values |= {f"slots/{i}/entity": float(entity) for i, entity in sorted(entity_of(context).items())}
    except DataError as error:
        notes.append(f"No entities of slots: {error.what}.")
    used = acts | claims
    values |= {f"slots/{i}/used": float(used[i]) for i in range(slots)}
    values["slots/used"] = float(used.sum())
    means = values | {key: estimate.mean for key, estimate in estimates.items()}
    if (share := steered(means)) is not None:
        values["slots/steered"] = share
        notes += [
            f"Slot {i} stands for entity {values[f'slots/{i}/entity']:.0f} and does not steer it: replacing its latent "
            f"action costs {means[f'slots/{i}/effect_db']:.2f} dB."
            for i in _with_entity(means)
            if means[f"slots/{i}/effect_db"] <= MIN_EFFECT
        ]
    return Findings(estimates, values, tuple(notes))


def steered(metrics: Mapping[str, float]) -> float | None:
    """Share of the entities that have a slot whose slot's own latent action acts, of this measure's other metrics. None
    without entities or latent actions.

    A slot may know where an entity is while the latent action of another one moves it; DCI does not see that, and
    leakage, which is pooled by how much changes, does not either.
    """
    slots = [i for i in _with_entity(metrics) if f"slots/{i}/effect_db" in metrics]
    return sum(metrics[f"slots/{i}/effect_db"] > MIN_EFFECT for i in slots) / len(slots) if slots else None


def _with_entity(metrics: Mapping[str, float]) -> list[int]:
    return sorted(int(key.split("/")[1]) for key in metrics if re.fullmatch(r"slots/\d+/entity", key))


def won_patches(seen: Observed) -> tuple[np.ndarray, np.ndarray]:
    """How many patches each slot wins (its mask is the largest), over the frames of each clip but the last: of those
    that change until the next frame, float64 [N, K], and of all, [N, K]. Raises ValueError without masks."""
    if seen.masks is None:
        raise ValueError("a model without slots has no masks")
    n, _, slots, patches = seen.masks.shape
    side = seen.frames.shape[2] // round(patches**0.5)
    moving, everything = np.zeros((n, slots)), np.zeros((n, slots))
    for i in range(n):  # clip by clip: all frames as floats at once would take gigabytes
        frames = seen.frames[i].float().mean(dim=-1) / 255
        change = F.avg_pool2d((frames[1:] - frames[:-1]).abs()[:, None], side).flatten(1)
        winner = F.one_hot(seen.masks[i, :-1].argmax(dim=1), slots)  # [T - 1, P, K]
        moving[i] = (winner * (change > MOVING)[..., None]).sum(dim=(0, 1)).double().numpy()
        everything[i] = winner.sum(dim=(0, 1)).double().numpy()
    return moving, everything


def used_slots(metrics: dict[str, float]) -> list[int]:
    """Numbers of the slots in use, of the metrics that this measure gave: what `Flam.pruned` may keep."""
    numbers = sorted(int(key.split("/")[1]) for key in metrics if re.fullmatch(r"slots/\d+/used", key))
    return [i for i in numbers if metrics[f"slots/{i}/used"] == 1.0]


SLOTS = Measure("slots", "slot usage", ("slots",), _run)
