"""What a pass over a clip gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flam_core.model.latent_action import LatentActions


@dataclass(frozen=True)
class Prediction:
    """One teacher-forced pass over T frames: everything the loss and the meters need.

    slots [B, T, K, D], masks [B, T, K, P], actions of the T - 1 transitions, next_slots [B, T - 1, K, D] and next_z
    [B, T - 1, P, C], the predictions for frames 1 .. T - 1. bridged_z: next_z had the next slots been predicted
    perfectly (only if asked for). prior_nll: [B, T - 1, K], what the learned prior says of the actions, in nats (None
    without latent actions). motion_error: [B, T - 1, K], what the actions say amiss of how slots move, in squared
    patches (only with `model.motion_readout`). A model without slots has patches in their place (S = P) and no masks.
    """

    slots: Tensor
    masks: Tensor | None
    actions: LatentActions
    next_slots: Tensor
    next_z: Tensor
    bridged_z: Tensor | None = None
    prior_nll: Tensor | None = None
    motion_error: Tensor | None = None
