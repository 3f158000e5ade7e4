"""Latent actions: a bottleneck a slot, continuous or discrete (flam-spec: latent action), or what stands in for one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flam_core.config import ModelConfig
from flam_core.ranks import add_up, gathered

_USAGE_DECAY = 0.99
"""Of the running share of a code, where the codebook itself has no rate."""


@dataclass(frozen=True)
class LatentActions:
    """The latent actions of T - 1 transitions; K of them each (1 in a monolithic model).

    sample: [B, T - 1, K, A], what the forward dynamics gets while training (noisy, or a code with straight-through
        gradient). Of a bottleneck in evaluation mode it has no noise.
    mean: [B, T - 1, K, A], the best single guess, used to infer actions.
    penalty: [B, T - 1, K], KL to N(0, I) in nats (Gaussian) or commitment and codebook loss (VQ); else zeros.
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
        self.gain = config.log_variance_gain
        nn.init.constant_(self.head.bias[config.action_dim :], config.initial_log_variance)
        with torch.no_grad():  # the gain is of what is learnt: at the start it makes no difference
            self.head.weight[config.action_dim :] /= self.gain
            self.head.bias[config.action_dim :] /= self.gain
        self.places: tuple[Tensor, int] | None = None
        """Which clips int64 [B] of a larger batch, of how many, the next batch holds: it then gets the noise that they
        would get in the larger one, however that is shared out. None: the batch is a whole one."""

    def forward(self, h: Tensor) -> LatentActions:
        """From the inverse dynamics' output [B, T - 1, K, D]."""
        mean, log_variance = self.head(h).float().chunk(2, dim=-1)
        log_variance = (self.gain * log_variance).clamp(-12.0, 4.0)
        sample = mean + self._noise(mean) * (0.5 * log_variance).exp() if self.training else mean
        kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).sum(dim=-1)
        return LatentActions(sample, mean, kl)

    def _noise(self, mean: Tensor) -> Tensor:
        if self.places is None:
            return torch.randn_like(mean)
        clips, of = self.places
        return torch.randn(of, *mean.shape[1:], dtype=mean.dtype, device=mean.device)[clips]

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Samples [*shape, A] of N(0, I)."""
        action_dim = self.head.out_features // 2
        noise = torch.randn(*shape, action_dim, generator=generator, dtype=torch.float32)
        return noise.to(self.head.weight.device)


class VQLatent(nn.Module):
    """One codebook for all slots (van den Oord et al. 2017), with straight-through gradients.

    Codes and what is quantised lie on the unit sphere, where the direction of a running sum is the mean to follow. With
    `config.codebook_centring` what is quantised is first counted from its running mean, slot by slot: what a slot's
    transitions have in common then takes no code (Lancucki et al. 2020 normalise for the same reason).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.commitment, self.decay, self.revival = config.commitment, config.codebook_decay, config.codebook_revival
        self.head = nn.Linear(config.width, config.action_dim)
        self.codebook = nn.Embedding(config.codebook, config.action_dim)
        nn.init.normal_(self.codebook.weight, std=config.action_dim**-0.5)
        self.codebook.weight.requires_grad_(self.decay is None)
        self.register_buffer("usage", torch.full((config.codebook,), 1 / config.codebook))
        self.register_buffer("sums", F.normalize(self.codebook.weight.detach(), dim=-1) / config.codebook)
        if config.codebook_centring:
            self.register_buffer("centre", torch.zeros(config.factors, config.action_dim))
            self.register_buffer("centre_weight", torch.zeros(()))
        else:
            self.centre = None
        self.quantising = True
        """False lets what is to be quantised through as it is, until the dynamics listen to it."""
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._heads: list[Tensor] = []

    centre: Tensor | None
    """Running mean [K, A] of the head's output, slot by slot."""
    centre_weight: Tensor
    """Of all that the mean rests on; it comes to 1 as steps pass."""
    sums: Tensor
    """Running mean of a transition's place at its code's row, zero at the others."""
    usage: Tensor
    """Running share of the transitions that fall to each code."""

    def forward(self, h: Tensor) -> LatentActions:
        """From the inverse dynamics' output [B, T - 1, K, D]."""
        y = self.head(h).float()
        x = F.normalize(y if self.centre is None else y - self.centre, dim=-1)
        book = self._book()
        codes = (x @ book.T).argmax(dim=-1)  # on the unit sphere the nearest code has the largest dot product
        quantised = book[codes]
        penalty = self.commitment * (x - quantised.detach()).pow(2).sum(dim=-1)
        if self.decay is None:
            penalty = penalty + (quantised - x.detach()).pow(2).sum(dim=-1)
        if self.training:
            self._seen.append((x.detach().flatten(0, -2), codes.flatten()))
            self._heads.append(y.detach().flatten(0, -3))
        if not self.quantising:
            return LatentActions(x, x, torch.zeros_like(penalty), codes)
        return LatentActions(x + (quantised - x).detach(), quantised.detach(), penalty, codes)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the codebook after an optimiser step: codes to the mean of what fell to them, dead ones to a transition.

        By what all ranks saw since the last call, so the outcome is the same on each.
        """
        if not self._seen:
            return
        x, codes = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        self._follow_centre()
        if not self.quantising:
            return
        weight, count = self.codebook.weight, self.codebook.num_embeddings
        sums = torch.zeros_like(weight, dtype=torch.float32).index_add_(0, codes, x)
        shares = torch.bincount(codes, minlength=count).to(sums.dtype)
        x = gathered(x)
        fresh = x[torch.randint(len(x), (count,), device=x.device)]  # on all ranks the same: they draw alike
        add_up(sums)
        add_up(shares)
        decay = _USAGE_DECAY if self.decay is None else self.decay
        self.sums.mul_(decay).add_(sums / shares.sum(), alpha=1 - decay)
        self.usage.mul_(decay).add_(shares / shares.sum(), alpha=1 - decay)
        if self.decay is not None:
            weight.copy_(F.normalize(self.sums, dim=-1))
        dead = self.usage < self.revival / count
        weight[dead] = fresh[dead].to(weight.dtype)
        self.sums[dead] = fresh[dead] / count
        self.usage[dead] = 1 / count

    def seen(self) -> Tensor:
        """What was to be quantised [N, A] since the last `after_step`, on this rank."""
        return torch.cat([x for x, _ in self._seen])

    @torch.no_grad()
    def start_codes(self, x: Tensor, seed: int) -> None:
        """Set the codes to the clusters of x [N, A]."""
        from sklearn.cluster import KMeans  # a second, once in a run, which no other start need wait for

        means = KMeans(self.codebook.num_embeddings, n_init=4, random_state=seed)  # pyright: ignore[reportArgumentType]
        centres = means.fit(x.double().cpu().numpy()).cluster_centers_
        self.codebook.weight.copy_(F.normalize(torch.from_numpy(centres), dim=-1))
        self.sums.copy_(self.codebook.weight / len(centres))
        self.usage.fill_(1 / len(centres))

    def _follow_centre(self) -> None:
        heads = torch.cat(self._heads)  # [transitions, K, A]
        self._heads.clear()
        if self.centre is None:
            return
        total, count = heads.sum(dim=0), heads.new_tensor(len(heads))
        add_up(total)
        add_up(count)
        decay = _USAGE_DECAY if self.decay is None else self.decay
        self.centre_weight.mul_(decay).add_(1 - decay)
        self.centre.lerp_(total / count, ((1 - decay) / self.centre_weight).item())

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Uniformly drawn codes [*shape, A]."""
        return self.vectors(torch.randint(self.codebook.num_embeddings, shape, generator=generator))

    def vectors(self, codes: Tensor) -> Tensor:
        """The latent actions float32 [..., A] of code numbers int64 [...]."""
        return self._book()[codes.to(self.codebook.weight.device)]

    def _book(self) -> Tensor:
        return F.normalize(self.codebook.weight.float(), dim=-1)


class NoLatent(nn.Module):
    """Zeros: a model that is told nothing of what happens (SlotFormer)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.action_dim = config.action_dim

    def forward(self, h: Tensor) -> LatentActions:
        """Of the shape that the inverse dynamics' output [B, T - 1, K, D] asks for."""
        zeros = h.new_zeros(*h.shape[:-1], self.action_dim, dtype=torch.float32)
        return LatentActions(zeros, zeros, zeros[..., 0])

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Zeros [*shape, A]."""
        return torch.zeros(*shape, self.action_dim)


class TrueActions(nn.Module):
    """The data set's actions, embedded: what a world model with action labels is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.true_actions is not None  # ModelConfig sees to it
        self.entities, self.numbers, self.kinds = config.true_actions
        inputs = self.entities * self.numbers * max(1, self.kinds)
        self.embed = nn.Linear(inputs, config.latent_width)

    def forward(self, actions_btns: Tensor) -> LatentActions:
        """Of true actions float32 [B, T - 1, N, S]."""
        x = actions_btns.float().nan_to_num()
        if self.kinds:
            x = F.one_hot(x.round().long().clamp(0, self.kinds - 1), self.kinds).to(self.embed.weight.dtype)
        embedded = self.embed(x.flatten(2))[:, :, None].float()
        return LatentActions(embedded, embedded, torch.zeros_like(embedded[..., 0]))

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Embedded uniformly drawn actions (normal ones where actions are values) [*shape, A]; shape ends with 1."""
        size = (*shape[:-1], self.entities, self.numbers)
        if self.kinds:
            drawn = torch.randint(self.kinds, size, generator=generator).float()
        else:
            drawn = torch.randn(size, generator=generator)
        flat = drawn.reshape(-1, 1, self.entities, self.numbers).to(self.embed.weight.device)
        return self.forward(flat).mean.reshape(*shape, -1)


Latent = GaussianLatent | VQLatent | NoLatent


def make_latent(config: ModelConfig) -> Latent:
    """The bottleneck that the config asks for."""
    kinds: dict[str, type[Latent]] = {"gaussian": GaussianLatent, "vq": VQLatent, "none": NoLatent}
    return kinds[config.latent](config)
