"""The losses of both stages and the meters that tell whether they do what they should."""

from __future__ import annotations

import torch
from torch import Tensor

from flam_core.config import LossConfig
from flam_core.learning.meters import latent_meters


def tokenizer_loss(
    reconstruction: Tensor, frames: Tensor, distance: Tensor, commitment: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of frames [N, 3, H, W] in [0, 1], and its meters (flam-spec: stage 1).

    Plus `commitment` times the mean squared distance from the quantiser's levels.
    """
    mse = (reconstruction.float() - frames).pow(2).mean()
    return mse + commitment * distance, {
        "tokenizer/mse": mse.detach(),
        "tokenizer/psnr": -10 * mse.detach().clamp_min(1e-10).log10(),
        "tokenizer/code_distance": distance.detach(),
    }


def beta_at(config: LossConfig, progress: float) -> float:
    """The weight of the KL when a share `progress` in [0, 1] of the steps is done."""
    start, end = config.beta_warmup
    if start == end:
        return config.beta if progress >= end else 0.0
    return config.beta * min(1.0, max(0.0, (progress - start) / (end - start)))


def flam_loss(
    dynamics: torch.nn.Module, z: Tensor, config: LossConfig, beta: float, true_actions: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The stage-2 loss of features z [B, T, P, C] and its meters (flam-spec: loss).

    Mean squared error of the predicted features, one step ahead and, if asked for, `rollout_steps` ahead in slot
    space, plus beta times the KL summed over slots (for VQ: the codebook and commitment loss, with weight 1).
    The learned prior's likelihood is added, but shares no gradient with the rest. true_actions: float32 [B, T, N, S],
    for a model of them.
    """
    prediction, rollout = dynamics(z, config.rollout_steps, bridge=config.bridge > 0, true_actions=true_actions)
    error = (prediction.next_z.float() - z[:, 1:]).pow(2)
    one_step = error.mean()
    penalties = prediction.actions.penalty.mean(dim=(0, 1))
    discrete = prediction.actions.codes is not None
    if discrete:
        loss = one_step + penalties.sum()
    else:
        loss = one_step + beta * (penalties - config.free_bits).clamp_min(0).sum()
    with torch.no_grad():
        copy = (z[:, 1:] - z[:, :-1]).pow(2).mean()
        meters = {
            "flam/one_step": one_step.detach(),
            "flam/copy": copy,
            "flam/explained": 1 - one_step.detach() / copy.clamp_min(1e-8),
            "flam/kl": penalties.detach().sum(),
            "flam/beta": torch.tensor(beta),
            **latent_meters(prediction),
        }
    if prediction.prior_nll is not None:
        nll = prediction.prior_nll.mean()
        loss = loss + nll
        meters["flam/prior_nll"] = nll.detach()
    if prediction.bridged_z is not None:
        bridged = (prediction.bridged_z.float() - z[:, 1:]).pow(2).mean()
        loss = loss + config.bridge * bridged
        meters["flam/bridged"] = bridged.detach()
    if config.slot_prediction > 0:
        slot_error = (prediction.next_slots.float() - prediction.slots[:, 1:].detach().float()).pow(2).mean()
        loss = loss + config.slot_prediction * slot_error
        meters["flam/slot_error"] = slot_error.detach()
    if prediction.motion_error is not None:
        motion_error = prediction.motion_error.mean()
        loss = loss + config.motion * motion_error
        meters["flam/motion_error"] = motion_error.detach()
    if rollout is not None:
        rolled = (rollout.float() - z[:, -rollout.shape[1] :]).pow(2).mean()
        loss = loss + config.rollout_weight * rolled
        meters["flam/rollout"] = rolled.detach()
    return loss, meters
