"""Finite scalar quantisation (Mentzer et al. 2023): each dimension is bounded and rounded to a few levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Rounds each of len(levels) dimensions to its levels; gradients pass straight through the rounding."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        steps = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("steps", torch.tensor(steps), persistent=False)

    levels: Tensor
    steps: Tensor

    def bound(self, x: Tensor) -> Tensor:
        """[..., L] -> [..., L] such that rounding gives exactly `levels` values a dimension."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (x + shift).tanh() * half - offset

    def forward(self, x: Tensor, left_alone: Tensor | None = None) -> Tensor:
        """[..., L] -> [..., L] in [-1, 1], quantised but where bool [...] `left_alone` says that it is only bounded."""
        bounded = self.bound(x.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        if left_alone is not None:
            rounded = torch.where(left_alone[..., None], bounded, rounded)
        return rounded / (self.levels // 2)

    def distance(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """Squared distance [..., L] of the bounded x [..., L] from the level that it is rounded to (at most 1/4), or
        that `to` is rounded to."""
        level = self.bound((x if to is None else to).detach().float()).round()
        return (self.bound(x.float()) - level).pow(2)

    def indices(self, x: Tensor) -> Tensor:
        """Code numbers int64 [...] of x [..., L]."""
        digits = self.bound(x.float()).round().long() + self.levels // 2
        return (digits * self.steps).sum(dim=-1)
