"""Inverse and forward dynamics. Both share their weights over slots (flam-spec: the four parts).

What each may see is the heart of the method: an action of slot i must come from what all slots are now and from what
slot i becomes, and must move slot i only. tests/unit/test_dependencies.py proves it by gradients.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from flam_core.config import ModelConfig
from flam_core.model.attention import Attention, FeedForward, SpatialBlock, TemporalBlock
from flam_core.model.latent_action import LatentActions, make_latent
from flam_core.model.places import fine_moves


class InverseDynamics(nn.Module):
    """a_t^i = IDM(s_t^{1:K}, s_{t+1}^i).

    All mixing between slots comes first and over current slots alone; then each slot looks along its own track up to
    t + 1. The other order would leak the other slots' next values: that is `coupling` "global", an ablation. With "own"
    slots do not mix at all.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.coupling = config.coupling
        blocks = 0 if config.latent == "none" else config.blocks  # then nobody listens
        mixing = 0 if config.coupling == "own" else blocks
        self.spatial = nn.ModuleList(SpatialBlock(width, config.heads) for _ in range(mixing))
        self.temporal = nn.ModuleList(TemporalBlock(width, config.heads, config.temporal_window) for _ in range(blocks))
        self.norm = nn.LayerNorm(width) if blocks else nn.Identity()
        self.moves = nn.Linear(2, width) if config.slot_place and blocks else None
        self.latent = make_latent(config)

    def forward(self, slots_btkd: Tensor) -> LatentActions:
        """Latent actions of the T - 1 transitions between slots [B, T, K, D]."""
        h = slots_btkd if self.coupling == "global" else slots_btkd[:, :-1]
        for block in self.spatial:
            h = block(h)
        track = slots_btkd
        if self.coupling == "global":
            h, track = h[:, :-1], h
        for block in self.temporal:
            h = block(h, track, offset=1)
        h = self.norm(h)
        if self.moves is not None:
            h = h + self.moves(fine_moves(slots_btkd))
        return self.latent(h)


class _ForwardBlock(nn.Module):
    """Queries that carry an action look at the action-free slots of their frame, then along their own track."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.context_norm = nn.LayerNorm(config.width)
        self.spatial = Attention(config.width, config.heads)
        self.temporal = TemporalBlock(config.width, config.heads, config.temporal_window)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.spatial(self.norm(queries), self.context_norm(context))
        return self.temporal(queries)


class ForwardDynamics(nn.Module):
    """s^_{t+1}^i = FDM(s_t^{1:K}, a_t^i): sees all current slots, but only its own action. Residual on s_t^i.

    With `coupling` "global", an ablation, it sees the actions of all.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.coupling = config.coupling
        self.action = nn.Sequential(nn.Linear(config.action_dim, width), nn.GELU(), nn.Linear(width, width))
        self.context = nn.ModuleList(SpatialBlock(width, config.heads) for _ in range(config.blocks))
        self.mix = FeedForward(2 * width, 2 * width)
        self.join = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList(_ForwardBlock(config) for _ in range(config.blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, slots_btkd: Tensor, actions_btka: Tensor) -> Tensor:
        """Next slots [B, T, K, D] of current slots [B, T, K, D] and their actions [B, T, K, A]."""
        both = torch.cat([slots_btkd, self.action(actions_btka.to(slots_btkd.dtype))], dim=-1)
        queries = self.join(both + self.mix(both))
        context = queries if self.coupling == "global" else slots_btkd
        for block in self.context:
            context = block(context)
        for block in self.blocks:
            queries = block(queries, context)
        return slots_btkd + self.out(queries)


class Aggregator(nn.Module):
    """z^_{t+1} = AGG(z_t, s^_{t+1}^{1:K}): current patches ask the predicted slots what becomes of them.

    A learned null key lets a patch that no slot concerns attend to nothing. The output is added to z_t. With
    `aggregator_query` "place" patches ask by their place alone.
    """

    def __init__(self, config: ModelConfig, feature_dim: int, position: nn.Module) -> None:
        super().__init__()
        width = config.width
        self.position = position
        self.by_place = config.aggregator_query == "place"
        self.features = nn.Linear(feature_dim, width)
        self.slots = nn.Linear(width, width)
        self.null = nn.Parameter(torch.randn(1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.blocks))
        self.attentions = nn.ModuleList(
            Attention(width, config.heads, config.aggregator_sharpness) for _ in range(config.blocks)
        )
        self.mlps = nn.ModuleList(FeedForward(width, 2 * width) for _ in range(config.blocks))
        self.slot_norm = nn.LayerNorm(width)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, feature_dim))

    def forward(self, z_btpc: Tensor, slots_btkd: Tensor) -> Tensor:
        """Next features [B, T, P, C] of current features [B, T, P, C] and predicted slots [B, T, K, D]."""
        b, t = z_btpc.shape[:2]
        place = self.position()
        x = rearrange(self.features(z_btpc) + place, "b t p d -> (b t) p d")
        slots = rearrange(self.slots(self.slot_norm(slots_btkd)), "b t k d -> (b t) k d")
        slots = torch.cat([slots, self.null.to(slots.dtype).expand(b * t, -1, -1)], dim=1)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            queries = norm(place).expand_as(x) if self.by_place else norm(x)
            x = x + attention(queries, slots)
            x = x + mlp(x)
        return z_btpc + rearrange(self.out(x), "(b t) p c -> b t p c", b=b)
