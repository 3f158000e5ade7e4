"""The tokenizer: a frame to a grid of patch features and back (flam-spec: stage 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flam_core.config import TokenizerConfig
from flam_core.model.fsq import FSQ

_NEAR = 1 / 16
"""Squared distance from a level, half of the way to its border, that `reread` lets pass."""


class ResidualBlock(nn.Module):
    """IMPALA's residual block (Espeholt et al. 2018), whose convolutions have side 3."""

    def __init__(self, channels: int, side: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, side, padding=side // 2)
        self.second = nn.Conv2d(channels, channels, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class Encoder(nn.Module):
    """Frames [N, 3, H, W] to features [N, C, H / stride, W / stride]: IMPALA stages of convolution, pooling and two
    residual blocks. With `config.encoder` "patches" no convolution reaches over a patch's border.

    The features of a patch are normalised. Without that they grow until the bounds of FSQ saturate, every patch gets
    the same code and the gradient is gone (one seed in two at learning rates from 2e-3 on, docs/devlog.md).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(config.unshuffle)]
        width = 3 * config.unshuffle**2
        apart = config.encoder == "patches"
        side = 1 if apart else 3
        for channels in config.channels:
            if apart:
                layers += [nn.Conv2d(width, channels, 2, stride=2)]
            else:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(channels, side), ResidualBlock(channels, side)]
            width = channels
        layers += [nn.ReLU(), nn.Conv2d(width, config.feature_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: Tensor) -> Tensor:
        features = self.layers(frames).movedim(1, -1)
        exact = features.to(torch.promote_types(features.dtype, torch.float32))  # not in bf16
        return F.layer_norm(exact, exact.shape[-1:]).movedim(-1, 1)


class Decoder(nn.Module):
    """Codes [N, L, h, w] to frames [N, 3, H, W] (0 black, 1 white): deconvolutions with residual blocks."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        stages = tuple(reversed(config.channels))
        layers: list[nn.Module] = [nn.Conv2d(len(config.fsq_levels), stages[0], 3, padding=1)]
        for channels, following in zip(stages, (*stages[1:], stages[-1]), strict=True):
            layers += [
                ResidualBlock(channels),
                nn.ReLU(),
                nn.ConvTranspose2d(channels, following, 4, stride=2, padding=1),
            ]
        layers += [
            ResidualBlock(stages[-1]),
            nn.ReLU(),
            nn.Conv2d(stages[-1], 3 * config.unshuffle**2, 3, padding=1),
            nn.PixelShuffle(config.unshuffle),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes) + 0.5


class Tokenizer(nn.Module):
    """Encoder, FSQ and decoder.

    FLAM works on features z *before* quantisation, which `standardise` brings to a common scale at the end of stage 1,
    so that the stage-2 loss has the same scale whatever the tokenizer.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.to_codes = nn.Conv2d(config.feature_dim, len(config.fsq_levels), 1)
        self.fsq = FSQ(config.fsq_levels)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("whiten", torch.eye(config.feature_dim))
        self.register_buffer("unwhiten", torch.eye(config.feature_dim))

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What stage 1 trains: the reconstruction [N, 3, H, W] in [0, 1] of frames [N, 3, H, W] in [0, 1], and the mean
        squared distance of what is quantised from its levels. With `config.chessboard` every other patch is drawn from
        what is not quantised; with `config.reread` the distance of what is read of the reconstruction is added.
        """
        unquantised = self._to_quantise(self.encoder(frames * 2 - 1))
        left_alone = None
        if self.config.chessboard:
            side = torch.arange(self.config.grid, device=frames.device)
            left_alone = (side[:, None] + side) % 2 == 0
        drawn = self._draw(unquantised, left_alone)
        distance = self.fsq.distance(unquantised).mean()
        if self.config.reread:
            again = self._to_quantise(self.encoder(drawn.detach().clamp(0, 1) * 2 - 1))
            distance = distance + (self.fsq.distance(again, to=unquantised) - _NEAR).clamp_min(0).mean()
        return drawn, distance

    def encode(self, frames_u8: Tensor) -> Tensor:
        """Standardised features z float [..., P, C] of uint8 frames [..., H, W, 3]."""
        shape = frames_u8.shape[:-3]
        x = rearrange(frames_u8.reshape(-1, *frames_u8.shape[-3:]), "n h w c -> n c h w")
        z = self.encoder(x.to(self.mean.dtype).div(127.5).sub(1))
        z = rearrange(z, "n c h w -> n (h w) c").reshape(*shape, self.config.patches, self.config.feature_dim)
        with torch.autocast(z.device.type, enabled=False):  # small differences of large numbers: not in bf16
            return (z.to(self.mean.dtype) - self.mean) @ self.whiten

    def decode(self, z: Tensor) -> Tensor:
        """Frames float [..., H, W, 3] in [0, 1] of standardised features [..., P, C], which are quantised first."""
        shape = z.shape[:-2]
        features = self._raw(z).reshape(-1, *z.shape[-2:])
        frames = self._draw(self._to_quantise(rearrange(features, "n (h w) c -> n c h w", h=self.config.grid)))
        return rearrange(frames, "n c h w -> n h w c").reshape(*shape, *frames.shape[-2:], 3)

    def codes(self, z: Tensor) -> Tensor:
        """Code numbers int64 [..., P] of standardised features [..., P, C]."""
        return self.fsq.indices(F.linear(self._raw(z), self.to_codes.weight.flatten(1), self.to_codes.bias))

    def _to_quantise(self, features: Tensor) -> Tensor:
        """[N, h, w, L] of the encoder's own features [N, C, h, w]."""
        return rearrange(self.to_codes(features), "n l h w -> n h w l")

    def _draw(self, unquantised: Tensor, left_alone: Tensor | None = None) -> Tensor:
        """[N, 3, H, W] of what is quantised first, [N, h, w, L], but for patches bool [h, w] that are left alone."""
        codes = self.fsq(unquantised, left_alone)
        return self.decoder(rearrange(codes, "n h w l -> n l h w").to(unquantised.dtype))

    @torch.no_grad()
    def moments(self, frames_u8: Tensor) -> Tensor:
        """Count, sum and second moments of the raw features, float64 [2 + C, C], over uint8 frames [..., H, W, 3].

        Moments of several samples add up, also across ranks.
        """
        z = self._raw(self.encode(frames_u8).double()).flatten(0, -2)
        return torch.cat([torch.full_like(z[:1], len(z)), z.sum(dim=0, keepdim=True), z.T @ z])

    @torch.no_grad()
    def standardise(self, moments: Tensor) -> None:
        """Set the standardisation from `moments`, so that features have mean 0 and, on average, variance 1.

        With `config.whitening` set, directions in feature space are brought to like variance, up to a floor of that
        share of the mean variance, below which there is mostly noise. Without, one deviation serves all channels.
        """
        count, total, second = moments[0, 0], moments[1], moments[2:]
        mean = total / count
        covariance = second / count - mean[:, None] * mean[None]
        size = covariance.diagonal().mean().clamp_min(1e-12)
        if self.config.whitening is None:
            forth = torch.eye(len(mean), dtype=moments.dtype, device=moments.device) / size.sqrt()
        else:
            variances, directions = torch.linalg.eigh(covariance)
            scales = (variances.clamp_min(0) + self.config.whitening * size).rsqrt()
            scales = scales / (scales.pow(2) * variances.clamp_min(0)).mean().sqrt().clamp_min(1e-6)
            forth = directions @ scales.diag() @ directions.T
        self.mean.copy_(mean)
        self.whiten.copy_(forth)
        self.unwhiten.copy_(torch.linalg.inv(forth))

    def _raw(self, z: Tensor) -> Tensor:
        """The encoder's own features of standardised ones."""
        return z @ self.unwhiten.to(z.dtype) + self.mean.to(z.dtype)
