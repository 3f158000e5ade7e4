"""Where a slot is, by what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

_FOCUS = 4.0
"""Power that weights are raised to: a faint look at all of the background would weigh as much as an entity else."""


def centres(weights: Tensor) -> Tensor:
    """Centres (x, y) float32 [..., 2] of weights [..., P] over a square grid, in shares of the frame's side.

    Of what slots read (`Flam.look`), not of their masks: the centre of a mask moves with its entity where the mask
    leaves the background to others, which the weights do by themselves (grid world: moves of masks' centres and of
    entities correlate by 0.31 to 0.86, those of what is read by 1.00).
    """
    grid = round(weights.shape[-1] ** 0.5)
    place = (torch.arange(grid, device=weights.device) + 0.5) / grid
    at = torch.stack([place.repeat(grid), place.repeat_interleave(grid)], dim=-1)
    sharp = (weights.float() / weights.float().amax(dim=-1, keepdim=True).clamp_min(1e-12)) ** _FOCUS
    return (sharp @ at) / sharp.sum(dim=-1, keepdim=True)
