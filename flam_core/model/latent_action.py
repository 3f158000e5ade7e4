"""Latent actions: a bottleneck a slot, continuous or discrete (flam-spec: latent action)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flam_core.config import ModelConfig


@dataclass(frozen=True)
class LatentActions:
    """The latent actions of T - 1 transitions.

    sample: [B, T - 1, K, A], what the forward dynamics gets while training (noisy, or a code with straight-through
        gradient).
    mean: [B, T - 1, K, A], the best single guess, used to infer actions.
    penalty: [B, T - 1, K], KL to N(0, I) in nats (Gaussian) or codebook and commitment loss (VQ).
    codes: int64 [B, T - 1, K] (VQ only).
    """

    sample: Tensor
    mean: Tensor
    penalty: Tensor
    codes: Tensor | None = None


class GaussianLatent(nn.Module):
    """A diagonal Gaussian, reparameterised, with the KL to N(0, I)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.width, 2 * config.action_dim)
        nn.init.constant_(self.head.bias[config.action_dim :], config.initial_log_variance)

    def forward(self, h: Tensor) -> LatentActions:
        """From the inverse dynamics' output [B, T - 1, K, D]."""
        mean, log_variance = self.head(h).float().chunk(2, dim=-1)
        log_variance = log_variance.clamp(-12.0, 4.0)
        sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).sum(dim=-1)
        return LatentActions(sample, mean, kl)

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples [*shape, A] of N(0, I)."""
        action_dim = self.head.out_features // 2
        noise = torch.randn(*shape, action_dim, generator=generator, dtype=torch.float32)
        return noise.to(self.head.weight.device)


class VQLatent(nn.Module):
    """One codebook for all slots (van den Oord et al. 2017), with straight-through gradients."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.commitment = config.commitment
        self.head = nn.Linear(config.width, config.action_dim)
        self.codebook = nn.Embedding(config.codebook, config.action_dim)
        nn.init.normal_(self.codebook.weight, std=config.action_dim**-0.5)

    def forward(self, h: Tensor) -> LatentActions:
        """From the inverse dynamics' output [B, T - 1, K, D]."""
        x = F.normalize(self.head(h).float(), dim=-1)
        book = F.normalize(self.codebook.weight.float(), dim=-1)
        codes = (x @ book.T).argmax(dim=-1)  # on the unit sphere the nearest code has the largest dot product
        quantised = book[codes]
        penalty = (quantised - x.detach()).pow(2).sum(dim=-1)
        penalty = penalty + self.commitment * (x - quantised.detach()).pow(2).sum(dim=-1)
        return LatentActions(x + (quantised - x).detach(), quantised.detach(), penalty, codes)

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Uniformly drawn codes [*shape, A]."""
        codes = torch.randint(self.codebook.num_embeddings, shape, generator=generator)
        return F.normalize(self.codebook.weight.float(), dim=-1)[codes.to(self.codebook.weight.device)]


def make_latent(config: ModelConfig) -> GaussianLatent | VQLatent:
    """The bottleneck that the config asks for."""
    return VQLatent(config) if config.latent == "vq" else GaussianLatent(config)
