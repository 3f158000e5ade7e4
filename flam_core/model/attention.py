"""The attention blocks that all parts of FLAM are built from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of queries [..., Q, D] over a context [..., N, D], with an optional additive bias.

    Queries and keys are normalised and scaled by a learned factor a head (QK-norm, Dehghani et al. 2023), so how sharp
    attention starts out is a choice (`sharpness`: the standard deviation of its logits) and not an accident.
    """

    def __init__(self, width: int, heads: int, sharpness: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), sharpness).log())
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., Q, D]. `bias` broadcasts to [..., heads, Q, N]; -inf forbids."""
        q = rearrange(self.to_query(queries), "... n (h d) -> ... h n d", h=self.heads)
        k, v = rearrange(self.to_key_value(context), "... n (two h d) -> two ... h n d", two=2, h=self.heads)
        q = F.rms_norm(q, q.shape[-1:]) * self.log_scale.exp().to(q.dtype)
        k = F.rms_norm(k, k.shape[-1:])
        if bias is not None:
            bias = bias.to(q.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(rearrange(heads, "... h n d -> ... n (h d)"))


class FeedForward(nn.Sequential):
    """Pre-norm two-layer perceptron; the caller adds the residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class RelativeTime(nn.Module):
    """A learned bias by relative time, and the causal mask.

    Time enters attention only through how many frames lie between query and key, up to `window`, so a model trained
    on short clips rolls out as long as one likes. Heads start with different preferences for the recent past (slopes
    as in ALiBi), which lets them find "now" and "next" before anything else is learnt.
    """

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        slopes = 2.0 ** (2 - torch.arange(heads))
        self.bias = nn.Parameter(-slopes[:, None] * torch.arange(window))

    def forward(self, queries: int, keys: int, offset: int = 0) -> Tensor:
        """[heads, queries, keys]: query t may see keys max(0, t + offset - window + 1) .. t + offset."""
        device = self.bias.device
        last = torch.arange(queries, device=device)[:, None] + offset
        distance = last - torch.arange(keys, device=device)[None]
        allowed = (distance >= 0) & (distance < self.window)
        bias = self.bias[:, distance.clamp(0, self.window - 1)]
        return bias.masked_fill(~allowed, float("-inf"))


class SpatialBlock(nn.Module):
    """Self-attention among the K slots of one frame, then a perceptron: [..., K, D] -> [..., K, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = FeedForward(width, 2 * width)

    def forward(self, slots: Tensor) -> Tensor:
        normed = self.norm(slots)
        slots = slots + self.attention(normed, normed)
        return slots + self.mlp(slots)


class TemporalBlock(nn.Module):
    """Causal attention of each slot over its own frames, then a perceptron: [B, T, K, D] -> [B, T, K, D]."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.time = RelativeTime(heads, window)
        self.mlp = FeedForward(width, 2 * width)

    def forward(self, slots_btkd: Tensor, context_btkd: Tensor | None = None, offset: int = 0) -> Tensor:
        """Slot i at time t sees slot i of `context_btkd` (default: `slots_btkd`) up to time t + offset."""
        context = slots_btkd if context_btkd is None else context_btkd
        bias = self.time(slots_btkd.shape[1], context.shape[1], offset)
        queries = rearrange(self.norm(slots_btkd), "b t k d -> b k t d")
        keys = rearrange(self.context_norm(context), "b t k d -> b k t d")
        slots = slots_btkd + rearrange(self.attention(queries, keys, bias), "b k t d -> b t k d")
        return slots + self.mlp(slots)


class PositionCode(nn.Module):
    """Codes of unit scale for a square grid of patches: [P, D].

    Sines and cosines of both coordinates, then a learned perceptron. Codes of small scale leave slots without any
    notion of where their entity is (docs/devlog.md).
    """

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        places = (torch.arange(grid) + 0.5) / grid
        frequencies = torch.pi * 2.0 ** torch.arange(max(2, (grid - 1).bit_length() + 1))
        angles = places[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        ys, xs = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        self.register_buffer("waves", torch.cat([waves[ys], waves[xs]], dim=-1).flatten(0, 1), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(self.waves.shape[-1], width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    waves: Tensor

    def forward(self) -> Tensor:
        return self.norm(self.mlp(self.waves))
