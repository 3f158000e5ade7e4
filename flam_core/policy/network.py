"""The policy: a small IMPALA network from pixels to actions (Espeholt et al. 2018; Procgen's usual one)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from flam_core.errors import SettingsError
from flam_core.model.tokenizer import ResidualBlock
from flam_core.policy.config import PolicyConfig


class PolicyNetwork(nn.Module):
    """Logits of the player's actions from the newest frames. Each stage: convolution, pooling, two residual blocks."""

    def __init__(self, config: PolicyConfig, frame_size: int, choices: int) -> None:
        """`choices`: number of actions. Raises SettingsError if the stages leave nothing of a frame."""
        super().__init__()
        self.config, self.choices = config, choices
        layers: list[nn.Module] = []
        width, side = 3 * config.stack, frame_size
        for channels in config.channels:
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(channels), ResidualBlock(channels)]
            width, side = channels, (side + 1) // 2
        if 2 ** len(config.channels) > frame_size:
            raise SettingsError(
                f"policy.channels has {len(config.channels)} stages for frames of {frame_size} pixels",
                fix="Each stage halves the frame: take fewer.",
            )
        self.layers = nn.Sequential(
            *layers, nn.ReLU(), nn.Flatten(), nn.Linear(width * side**2, config.hidden), nn.ReLU()
        )
        self.head = nn.Linear(config.hidden, choices)
        nn.init.orthogonal_(self.head.weight, gain=0.01)  # begins with all actions alike
        nn.init.zeros_(self.head.bias)

    def forward(self, frames_u8: Tensor) -> Tensor:
        """Logits float32 [B, choices] of uint8 frames [B, stack, H, W, 3], the newest last."""
        x = rearrange(frames_u8, "b s h w c -> b (s c) h w").to(self.head.weight.dtype) / 255 - 0.5
        return self.head(self.layers(x.contiguous(memory_format=torch.channels_last))).float()
