"""I3D, the video network whose outputs FVD compares (Carreira and Zisserman 2017; Unterthiner et al. 2018).

The network alone: its weights are the user's to bring. State-dict names are those of the public `rgb_imagenet.pt` of
the PyTorch port (`Conv3d_1a_7x7.conv3d.weight` ... `logits.conv3d.bias`), trained on Kinetics-400.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 224
"""Pixels that videos are resized to."""
MIN_FRAMES = 9
"""Of a video: with fewer nothing is left to pool at the end."""
CLASSES = 400


class I3d(nn.Module):
    """Videos to the logits of Kinetics' classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": _Unit(3, 64, 7, stride=2),
            "MaxPool3d_2a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": _Unit(64, 64, 1),
            "Conv3d_2c_3x3": _Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
            "Mixed_3b": _Mixed(192, 64, 96, 128, 16, 32, 32),
            "Mixed_3c": _Mixed(256, 128, 128, 192, 32, 96, 64),
            "MaxPool3d_4a_3x3": _Pool((3, 3, 3), (2, 2, 2)),
            "Mixed_4b": _Mixed(480, 192, 96, 208, 16, 48, 64),
            "Mixed_4c": _Mixed(512, 160, 112, 224, 24, 64, 64),
            "Mixed_4d": _Mixed(512, 128, 128, 256, 24, 64, 64),
            "Mixed_4e": _Mixed(512, 112, 144, 288, 32, 64, 64),
            "Mixed_4f": _Mixed(528, 256, 160, 320, 32, 128, 128),
            "MaxPool3d_5a_2x2": _Pool((2, 2, 2), (2, 2, 2)),
            "Mixed_5b": _Mixed(832, 256, 160, 320, 32, 128, 128),
            "Mixed_5c": _Mixed(832, 384, 192, 384, 48, 128, 128),
        }
        self._order = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.logits = _Unit(1024, CLASSES, 1, plain=True)

    def forward(self, videos: Tensor) -> Tensor:
        """Logits [N, 400], averaged over time, of videos float [N, T, H, W, 3] in [0, 1], T at least MIN_FRAMES."""
        n, t = videos.shape[:2]
        frames = videos.flatten(0, 1).permute(0, 3, 1, 2)
        frames = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = frames.unflatten(0, (n, t)).transpose(1, 2) * 2 - 1
        for name in self._order:
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits(x).mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """Convolution, batch norm and ReLU; the convolution alone, with a bias, if `plain`."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = (side,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(inputs, outputs, side, stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.kernel, self.stride))
        return x if self.bn is None else self.bn(x).relu()


class _Pool(nn.Module):
    """Maximum over a window; what is padded counts as 0, as in the original."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_same(x, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    """An Inception block of four branches."""

    def __init__(self, inputs: int, one: int, a: int, three: int, b: int, small: int, pooled: int) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, one, 1)
        self.b1a, self.b1b = _Unit(inputs, a, 1), _Unit(a, three, 3)
        self.b2a, self.b2b = _Unit(inputs, b, 1), _Unit(b, small, 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))]
        return torch.cat(branches, dim=1)


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around x so that its size is divided by the stride, rounded up; the odd one goes behind."""
    pads: list[int] = []
    for size, side, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        missing = max(side - (size % step or step), 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)
