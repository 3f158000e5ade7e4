"""The rivals without slots: latent actions of the whole frame, and dynamics on its grid of features.

With one latent action it is a monolithic latent action model (AdaWorld with a Gaussian, Genie with a codebook), with
several a grouped one. Space and time alternate in attention, as there; the state is the features z themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.model.attention import Attention, PositionCode, SpatialBlock, TemporalBlock
from flam_core.model.latent_action import LatentActions, TrueActions, make_latent
from flam_core.model.prediction import Prediction
from flam_core.model.prior import ActionPrior


class _Blocks(nn.Module):
    """Attention over the patches of a frame, then of each patch over its own past."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.spatial = SpatialBlock(config.width, config.heads)
        self.temporal = TemporalBlock(config.width, config.heads, config.temporal_window)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(self.spatial(x))


class PatchInverse(nn.Module):
    """a_t = IDM(z_1 .. z_{t+1}): learned queries read frame t + 1, whose patches have looked at their past."""

    def __init__(self, config: ModelConfig, feature_dim: int, position: nn.Module) -> None:
        super().__init__()
        self.position = position
        self.features = nn.Linear(feature_dim, config.width)
        self.blocks = nn.ModuleList(_Blocks(config) for _ in range(config.blocks))
        self.queries = nn.Parameter(torch.randn(config.factors, config.width))
        self.context_norm = nn.LayerNorm(config.width)
        self.read = Attention(config.width, config.heads)
        self.norm = nn.LayerNorm(config.width)
        self.latent = make_latent(config)

    def forward(self, z_btpc: Tensor) -> LatentActions:
        """Latent actions of the T - 1 transitions between features [B, T, P, C]."""
        x = self.features(z_btpc) + self.position()
        for block in self.blocks:
            x = block(x)
        context = self.context_norm(x[:, 1:])
        queries = self.queries.to(x.dtype).expand(*context.shape[:2], -1, -1)
        return self.latent(self.norm(queries + self.read(queries, context)))


class PatchForward(nn.Module):
    """z^_{t+1} = FDM(z_1 .. z_t, a_t): each patch asks the actions what they do to it. Residual on z_t."""

    def __init__(self, config: ModelConfig, feature_dim: int, position: nn.Module) -> None:
        super().__init__()
        width = config.width
        self.position = position
        self.features = nn.Linear(feature_dim, width)
        self.action = nn.Sequential(nn.Linear(config.action_dim, width), nn.GELU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.blocks))
        self.reads = nn.ModuleList(Attention(width, config.heads) for _ in range(config.blocks))
        self.blocks = nn.ModuleList(_Blocks(config) for _ in range(config.blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, feature_dim))

    def forward(self, z_btpc: Tensor, actions_btka: Tensor) -> Tensor:
        """Next features [B, T, P, C] of current features [B, T, P, C] and actions [B, T, K, A]."""
        x = self.features(z_btpc) + self.position()
        actions = self.action(actions_btka.to(x.dtype))
        for norm, read, block in zip(self.norms, self.reads, self.blocks, strict=True):
            x = block(x + read(norm(x), actions))
        return z_btpc + self.out(x)


class PatchDynamics(nn.Module):
    """Inverse and forward dynamics on patches, with the face of `flam.Dynamics`; what are slots there are patches."""

    def __init__(self, config: ModelConfig, tokenizer: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        channels = tokenizer.feature_dim
        position = PositionCode(tokenizer.grid, config.width)
        self.forward_dynamics = PatchForward(config, channels, position)
        self.inverse: PatchInverse | TrueActions
        self.prior: ActionPrior | None = None
        if config.latent == "true":
            self.inverse = TrueActions(config)
        else:
            self.inverse = PatchInverse(config, channels, position)
            if config.latent != "none":
                self.prior = ActionPrior(config, channels)

    @property
    def latent(self) -> nn.Module:
        """The bottleneck, or the embedding of true actions."""
        return self.inverse if isinstance(self.inverse, TrueActions) else self.inverse.latent

    def state(self, z_btpc: Tensor) -> tuple[Tensor, None]:
        """The features as they are; no masks."""
        return z_btpc, None

    def infer(self, z_btpc: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        """Latent actions of the transitions between features [B, T, P, C].

        true_actions: float32 [B, T, N, S], for a model of true actions.
        """
        if isinstance(self.inverse, TrueActions):
            assert true_actions is not None, "a model of true actions must be given them"
            return self.inverse(true_actions[:, : z_btpc.shape[1] - 1])
        return self.inverse(z_btpc)

    def step(self, z: Tensor, tokens: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 1, P, C] of the frame after the last, twice: they are the state too."""
        following = self.forward_dynamics(tokens, actions)[:, -1:]
        return following, following

    def forward(
        self, z_btpc: Tensor, rollout_steps: int = 0, bridge: bool = False, true_actions: Tensor | None = None
    ) -> tuple[Prediction, Tensor | None]:
        """As `flam.Dynamics.forward`; there is nothing to bridge."""
        actions = self.infer(z_btpc, true_actions)
        next_z = self.forward_dynamics(z_btpc[:, :-1], actions.sample)
        rolled = None
        if rollout_steps:
            start = z_btpc.shape[1] - rollout_steps
            rolled = self.rollout(z_btpc[:, start - 1], z_btpc[:, :start], actions.sample)
        nll = None if self.prior is None else self.prior(z_btpc[:, :-1], actions)
        return Prediction(z_btpc, None, actions, next_z, next_z, prior_nll=nll), rolled

    def rollout(self, z: Tensor, tokens: Tensor, actions: Tensor) -> Tensor:
        """As `flam.Dynamics.rollout`: features [B, S, P, C] of S steps."""
        known = tokens.shape[1]
        for _ in range(actions.shape[1] - known + 1):
            recent = tokens[:, -self.config.temporal_window :]
            past = actions[:, : tokens.shape[1]][:, -recent.shape[1] :]
            tokens = torch.cat([tokens, self.step(z, recent, past)[1]], dim=1)
        return tokens[:, known:]
