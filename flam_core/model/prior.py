"""A learned prior over latent actions: what may happen next, given what is seen so far. The paper has none.

It makes futures without looking at them: sample an action for each slot, step, and so on. It is trained beside the rest
but apart from it: neither the state nor the actions that it learns from get a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flam_core.config import ModelConfig
from flam_core.model.attention import Attention, SpatialBlock, TemporalBlock
from flam_core.model.latent_action import LatentActions, VQLatent


class ActionPrior(nn.Module):
    """p(a_t^i | s_1..t): a mixture of diagonal Gaussians, or a probability for each code.

    Slots look at each other, then along their own past. Where there are patches instead, learned queries (one a latent
    action) read the frame first.
    """

    def __init__(self, config: ModelConfig, token_dim: int) -> None:
        super().__init__()
        self.config = config
        self.queries = None
        if config.state == "patches":
            self.queries = nn.Parameter(torch.randn(config.factors, config.width))
            self.inputs = nn.Linear(token_dim, config.width)
            self.read = Attention(config.width, config.heads)
        self.spatial = SpatialBlock(config.width, config.heads)
        self.temporal = TemporalBlock(config.width, config.heads, config.temporal_window)
        components = config.prior_components * (1 + 2 * config.action_dim)
        outputs = config.codebook if config.latent == "vq" else components
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, outputs))

    def forward(self, tokens: Tensor, actions: LatentActions) -> Tensor:
        """Negative log likelihood [B, T, K] in nats of the actions of T transitions, given the tokens [B, T, S, D] of
        the frames that they start from."""
        raw = self._raw(tokens.detach())
        if actions.codes is not None:
            return F.cross_entropy(raw.flatten(0, -2), actions.codes.flatten(), reduction="none").view(raw.shape[:-1])
        weights, means, log_scales = self._mixture(raw)
        target = actions.sample.detach().float()[..., None, :]
        exponent = ((target - means) * (-log_scales).exp()).pow(2).sum(dim=-1)
        constant = log_scales.sum(dim=-1) + 0.5 * self.config.action_dim * math.log(2 * math.pi)
        return -(weights.log_softmax(dim=-1) - 0.5 * exponent - constant).logsumexp(dim=-1)

    @torch.no_grad()
    def sample(self, tokens: Tensor, latent: nn.Module, generator: torch.Generator | None = None) -> Tensor:
        """Actions [B, K, A] drawn for the last frame of tokens [B, T, S, D]."""
        raw = self._raw(tokens)[:, -1]
        if isinstance(latent, VQLatent):
            return latent.vectors(_draw(raw, generator))
        weights, means, log_scales = self._mixture(raw)
        chosen = _draw(weights, generator)[..., None, None].expand(*means.shape[:-2], 1, means.shape[-1])
        mean, scale = means.gather(-2, chosen)[..., 0, :], log_scales.gather(-2, chosen)[..., 0, :].exp()
        return mean + scale * torch.randn(mean.shape, generator=generator).to(mean.device)

    def _raw(self, tokens: Tensor) -> Tensor:
        """[B, T, K, outputs]"""
        h = tokens
        if self.queries is not None:
            h = self.queries.to(tokens.dtype).expand(*tokens.shape[:2], -1, -1)
            h = h + self.read(h, self.inputs(tokens))
        return self.head(self.temporal(self.spatial(h))).float()

    def _mixture(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [..., M], means and logarithms of the deviations [..., M, A] of M components."""
        m, a = self.config.prior_components, self.config.action_dim
        weights, means, log_scales = raw.split([m, m * a, m * a], dim=-1)
        shape = (*raw.shape[:-1], m, a)
        return weights, means.reshape(shape), log_scales.reshape(shape).clamp(-6.0, 2.0)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices int64 [...] drawn by logits [..., N], on the CPU, so that a seed means the same on every device."""
    chances = logits.softmax(dim=-1).cpu()
    drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
    return drawn.view(chances.shape[:-1]).to(logits.device)
