"""What one batch tells of the health of codes, latent actions and slots. `collapse` watches these numbers over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flam_core.model.prediction import Prediction

ACTIVE_VARIANCE = 0.01
"""A latent dimension is in use if its posterior mean varies by more than this (Burda et al. 2016)."""


@torch.no_grad()
def latent_meters(prediction: Prediction) -> dict[str, Tensor]:
    """The latent actions and masks of one batch in numbers: float32 scalars on the device of the prediction.

    Gaussian latent actions (K a transition):
        flam/kl_slot_{i}: KL of the i-th latent action to the prior, nats, mean over batch and time.
        flam/active_units, flam/active_units_slot_{i}: share of latent dimensions whose posterior mean varies over batch
            and time by more than `ACTIVE_VARIANCE`; of all, and of the i-th latent action's own.
    VQ:
        flam/codebook_perplexity: exp of the entropy of code use; 1 if all transitions get one code.
        flam/codebook_perplexity_slot_{i}: the same over the i-th latent action alone.
        flam/codes_used: number of codes that occur.
    Slots (none of them without masks):
        flam/slot_share_{i}: share of all patches that slot i claims. They sum to 1.
        flam/largest_mask_share: the largest of these.
        flam/slot_overlap: mean cosine between the masks of two slots in a frame. 0: no patch is shared; 1: all slots
            claim the same. Only with two slots or more.
    A model without latent actions of its own (none, true actions) has no numbers for them.
    """
    meters: dict[str, Tensor] = {}
    actions = prediction.actions
    if actions.codes is not None:
        meters |= _code_meters(actions.codes)
    elif prediction.prior_nll is not None:  # only what has a prior is a latent of the model's own
        varies = actions.mean.float().var(dim=(0, 1), correction=0) > ACTIVE_VARIANCE
        active = varies.float().mean(dim=-1)
        kl = actions.penalty.float().mean(dim=(0, 1))
        meters |= {f"flam/kl_slot_{i}": value for i, value in enumerate(kl)}
        meters["flam/active_units"] = active.mean()
        meters |= {f"flam/active_units_slot_{i}": value for i, value in enumerate(active)}
    if prediction.masks is not None:
        meters |= _mask_meters(prediction.masks)
    return meters


@torch.no_grad()
def tokenizer_meters(frames: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """What the tokenizer is to be better than, and whether it tells patches apart: float32 scalars.

    frames: float [N, 3, H, W] in [0, 1]. codes: int64, any shape, the code numbers of some frames' patches.
        tokenizer/flat_psnr: PSNR in dB of the mean colour of all frames, painted everywhere.
        tokenizer/codes_used: number of codes that occur.
    """
    flat = frames.float().var(dim=(0, 2, 3), correction=0).mean()
    return {
        "tokenizer/flat_psnr": -10 * flat.clamp_min(1e-10).log10(),
        "tokenizer/codes_used": _code_use(codes.flatten())[1],
    }


def _code_meters(codes_btk: Tensor) -> dict[str, Tensor]:
    each, _ = _code_use(codes_btk.flatten(0, 1).T)
    together, used = _code_use(codes_btk.flatten())
    return {
        "flam/codebook_perplexity": together,
        "flam/codes_used": used,
        **{f"flam/codebook_perplexity_slot_{i}": value for i, value in enumerate(each)},
    }


def _code_use(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity and number of the codes that occur in int64 [..., N], both float32 [...].

    By how often each element's code occurs, not by a histogram: that would have to know the codebook's size, or ask the
    device for the largest code and wait.
    """
    ordered = codes.sort(dim=-1).values.contiguous()
    counts = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    entropy = -(counts / codes.shape[-1]).log().mean(dim=-1)
    return entropy.exp(), (1 / counts).sum(dim=-1).round()


def _mask_meters(masks_btkp: Tensor) -> dict[str, Tensor]:
    masks = masks_btkp.float()
    count = masks.shape[2]
    shares = masks.mean(dim=(0, 1, 3))
    meters = {"flam/largest_mask_share": shares.max()}
    meters |= {f"flam/slot_share_{i}": value for i, value in enumerate(shares)}
    if count > 1:
        unit = F.normalize(masks, dim=-1)
        # The cosines of all ordered pairs of slots, themselves left out: |sum of directions|^2 - K.
        pairs = unit.sum(dim=2).pow(2).sum(dim=-1) - unit.pow(2).sum(dim=(2, 3))
        meters["flam/slot_overlap"] = pairs.mean() / (count * (count - 1))
    return meters
