"""What all ranks of a run decide together, after every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flam_core.ranks import add_up


@dataclass(frozen=True)
class Agreed:
    """The same on each rank."""

    loss: float
    """Of the global batch."""
    stop: bool
    """Whether any rank was told to stop."""
    ask: bool
    """Whether any rank wants all to ask Ray whether a node is about to go."""


def agree(loss: torch.Tensor, clips: int, *, stop: bool, ask: bool) -> Agreed:
    """Share the loss on this rank's `clips` clips, and its wishes. All ranks must call it."""
    wishes = torch.tensor([clips, stop, ask], dtype=torch.float64, device=loss.device)
    values = add_up(torch.cat([loss.detach().double().reshape(1) * clips, wishes])).tolist()
    return Agreed(values[0] / values[1], values[2] > 0, values[3] > 0)
