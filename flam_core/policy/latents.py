"""Latent actions of all transitions of clips, inferred without a label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flam_core.errors import SettingsError
from flam_core.model.flam import Flam


@torch.no_grad()
def infer_latents(model: Flam, clips: Sequence[np.ndarray], batch: int = 8, window: int = 0) -> np.ndarray:
    """Latent actions float32 [M, K, A] (posterior mean) of the M transitions of clips uint8 [T, H, W, 3], in order.

    window: with so many transitions before and after each, in order of time: [M, K, (2 window + 1) A]. Beyond a clip's
    ends they are zero.
    batch: clips of equal length that go through the model at a time. Raises SettingsError for a model without latent
    actions of its own, or for another frame size.
    """
    if model.dynamics.config.latent in ("none", "true"):
        raise SettingsError(
            f"a model with latent {model.dynamics.config.latent!r} infers no latent actions",
            fix="Use one with gaussian or vq latent actions.",
        )
    size = model.tokenizer.config.frame_size
    if odd := {clip.shape[1:3] for clip in clips} - {(size, size)}:
        raise SettingsError(
            f"the model takes frames of {size}x{size}, the clips have {sorted(odd)[0]}",
            fix=f"Train one on the data, or make data of {size} pixels.",
        )
    device = next(model.parameters()).device
    found: dict[int, np.ndarray] = {}
    by_length = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    while by_length:
        length = len(clips[by_length[0]])
        group = [i for i in by_length[:batch] if len(clips[i]) == length]
        by_length = by_length[len(group) :]
        frames = torch.from_numpy(np.stack([clips[i] for i in group])).to(device)
        latents = model.infer_actions(model.slots(model.encode(frames))[0]).float().cpu().numpy()
        found |= dict(zip(group, _with_neighbours(latents, window), strict=True))
    return np.concatenate([found[i] for i in range(len(clips))])


def _with_neighbours(latents: np.ndarray, window: int) -> np.ndarray:
    """[B, T, K, (2 window + 1) A] of latent actions [B, T, K, A]."""
    length = latents.shape[1]
    padded = np.pad(latents, ((0, 0), (window, window), (0, 0), (0, 0)))
    return np.concatenate([padded[:, i : i + length] for i in range(2 * window + 1)], axis=-1)
