"""LPIPS: how different two pictures look, by the features of an AlexNet (Zhang et al. 2018, version 0.1).

The network alone: its weights are the user's to bring (docs/metrics.md says which are meant). State-dict names are
those of the public files: torchvision's AlexNet (`features.0.weight` ...) and lpips' linear layers
(`lin0.model.1.weight` ...).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS = (64, 192, 384, 256, 256)
MIN_SIDE = 31
"""Pixels: in smaller pictures nothing is left after the second pooling."""


class Lpips(nn.Module):
    """Distance of frames; 0 for equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        for i, channels in enumerate(_CHANNELS):
            self.add_module(f"lin{i}", _Linear(channels))
        # The mean and deviation of ImageNet's pixels, of values in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    shift: Tensor
    scale: Tensor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [N] of frames float [N, H, W, 3] in [0, 1], H and W at least MIN_SIDE."""
        total = a.new_zeros(len(a))
        for i, (left, right) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            linear: nn.Module = getattr(self, f"lin{i}")
            total = total + linear((_unit(left) - _unit(right)).square()).mean(dim=(1, 2, 3))
        return total

    def _features(self, frames: Tensor) -> list[Tensor]:
        x = (frames.permute(0, 3, 1, 2) * 2 - 1 - self.shift) / self.scale
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


class _Linear(nn.Module):
    """Channels to one number, with the names of the public file (its layer 0 is a dropout)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _unit(x: Tensor) -> Tensor:
    """Features [N, C, H, W] with length 1 over channels."""
    return F.normalize(x, dim=1, eps=1e-10)
