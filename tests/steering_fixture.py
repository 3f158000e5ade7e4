"""What the tests of steering share: a small model with random weights, clips, and puppets that say where they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from flam_core.model import Flam
from flam_core.steering.discovered import DiscoveredActions, discover_actions
from tests.evaluation_fixture import Puppets, grid_clips, puppet_clips, small_flam


def steered(**options: object) -> Flam:
    """A real model, small, whose latent actions change the picture; it sees 4 frames of the past."""
    return small_flam(**({"temporal_window": 4} | options)).eval()


def clips(count: int = 3, frames: int = 9) -> Tensor:
    """uint8 [count, frames, 48, 48, 3]"""
    return torch.from_numpy(np.stack([clip.frames for clip in grid_clips(count, 0, frames)]))


def puppets_film(count: int = 40) -> Tensor:
    """uint8 [count, 6, 32, 32, 3] of two puppets, for `WatchedPuppets`."""
    return torch.from_numpy(np.stack([clip.frames for clip in puppet_clips(count)]))


class WatchedPuppets(Puppets):
    """Puppets that say what they read: their own colour, and nothing else. Their latent action is how far they move."""

    def look(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        slots, masks = self.slots(z)
        colours = z[..., : self.factors].transpose(2, 3)
        return slots, masks, colours / colours.sum(dim=-1, keepdim=True)


def found_in_puppets(model: nn.Module, seed: int = 0) -> DiscoveredActions:
    return discover_actions(model, puppets_film(), seed=seed, entities={0: 0, 1: 1})  # type: ignore[arg-type]
