"""Where a slot is, by what it reads, and what its latent action says of where it goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


class MotionReadout(nn.Module):
    """Reads off a latent action, by one linear map for all slots and places, how far its slot moves.

    What a prediction needs, and what the KL costs, is the same if moves and latent actions change partners from one
    place to another; only a use of latent actions that does not know the place tells such codes from one that means
    the same everywhere. The paper has none (docs/devlog.md, 30 November).
    """

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(action_dim, 2)

    def forward(self, actions: Tensor, weights: Tensor) -> Tensor:
        """Squared error [B, T - 1, K], in patches, of what actions [B, T - 1, K, A] say of the way from centre to
        centre of what slots read, weights [B, T, K, P]. The weights get no gradient."""
        place = centres(weights.detach()) * weights.shape[-1] ** 0.5
        return (self.linear(actions).float() - (place[:, 1:] - place[:, :-1])).pow(2).sum(dim=-1)
