"""Where a slot is, by what it reads, and what its latent action says of where it goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FOCUS = 4.0
"""Power that weights are raised to: a faint look at all of the background would weigh as much as an entity else."""
ALL = 1.0
"""The power for slots that see no background: where a thing lies to a fraction of a patch is told by how much of it is
in which patch."""
_SPREAD = 4.0
"""Of the place in a slot: it runs from -2 to 2, as widely as the slot's other numbers."""
_FINE = 16.0


def centres(weights: Tensor, focus: float = FOCUS) -> Tensor:
    """Centres (x, y) float32 [..., 2] of weights [..., P] over a square grid, in shares of the frame's side.

    Of what slots read (`Flam.look`), not of their masks: the centre of a mask moves with its entity where the mask
    leaves the background to others, which the weights do by themselves (grid world: moves of masks' centres and of
    entities correlate by 0.31 to 0.86, those of what is read by 1.00).
    """
    grid = round(weights.shape[-1] ** 0.5)
    place = (torch.arange(grid, device=weights.device) + 0.5) / grid
    at = torch.stack([place.repeat(grid), place.repeat_interleave(grid)], dim=-1)
    sharp = (weights.float() / weights.float().amax(dim=-1, keepdim=True).clamp_min(1e-12)) ** focus
    return (sharp @ at) / sharp.sum(dim=-1, keepdim=True)


def moves(weights: Tensor, focus: float = FOCUS) -> Tensor:
    """How far the centres of what slots read move, float32 [B, T - 1, K, 2] in patches, of weights [B, T, K, P]."""
    place = centres(weights, focus) * weights.shape[-1] ** 0.5
    return place[:, 1:] - place[:, :-1]


def with_place(slots: Tensor, weights: Tensor) -> Tensor:
    """Slots [..., K, D] whose first two numbers are the centre of what they read, of weights [..., K, P]: what
    `slot_place` asks for."""
    place = _SPREAD * (centres(weights, ALL) - 0.5)
    return torch.cat([place.to(slots.dtype), slots[..., 2:]], dim=-1)


def fine_moves(slots: Tensor) -> Tensor:
    """How the places in slots [B, T, K, D] change, [B, T - 1, K, 2], large enough for a move by a fraction of a patch
    to stand beside other numbers: a sixteenth of the frame's side is 4."""
    return _FINE * (slots[:, 1:, :, :2] - slots[:, :-1, :, :2])


class MotionReadout(nn.Module):
    """Reads off a latent action, by one linear map for all slots and places, how far its slot moves.

    What a prediction needs, and what the KL costs, is the same if moves and latent actions change partners from one
    place to another; only a use of latent actions that does not know the place tells such codes from one that means
    the same everywhere. The paper has none (docs/devlog.md, 30 November).
    """

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(action_dim, 2)

    def forward(self, actions: Tensor, moved: Tensor) -> Tensor:
        """Squared error [B, T - 1, K], in patches, of what actions [B, T - 1, K, A] say of moves [B, T - 1, K, 2],
        which get no gradient."""
        return (self.linear(actions).float() - moved.detach().float()).pow(2).sum(dim=-1)
