"""FLAM: the tokenizer and the four parts together, and what one does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.model.dynamics import Aggregator, ForwardDynamics, InverseDynamics
from flam_core.model.factorizer import Factorizer
from flam_core.model.latent_action import LatentActions
from flam_core.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """One teacher-forced pass over T frames: everything the loss and the meters need.

    slots [B, T, K, D], masks [B, T, K, P], actions of the T - 1 transitions, next_slots [B, T - 1, K, D] and next_z
    [B, T - 1, P, C], the predictions for frames 1 .. T - 1. bridged_z: next_z had the next slots been predicted
    perfectly (only if asked for).
    """

    slots: Tensor
    masks: Tensor
    actions: LatentActions
    next_slots: Tensor
    next_z: Tensor
    bridged_z: Tensor | None = None


class Dynamics(nn.Module):
    """Factorizer, inverse dynamics, forward dynamics and aggregator: what stage 2 trains."""

    def __init__(self, config: ModelConfig, tokenizer: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.factorizer = Factorizer(config, tokenizer.feature_dim, tokenizer.grid)
        self.inverse = InverseDynamics(config)
        self.forward_dynamics = ForwardDynamics(config)
        self.aggregator = Aggregator(config, tokenizer.feature_dim, self.factorizer.position)

    def forward(self, z_btpc: Tensor, rollout_steps: int = 0, bridge: bool = False) -> tuple[Prediction, Tensor | None]:
        """Predict each frame's features from those before it and the inferred actions.

        With `rollout_steps` also returns the features [B, rollout_steps, P, C] of the last frames, rolled out in slot
        space from the frame before them.
        """
        slots, masks = self.factorizer(z_btpc)
        actions = self.inverse(slots)
        next_slots = self.forward_dynamics(slots[:, :-1], actions.sample)
        next_z = self.aggregator(z_btpc[:, :-1], next_slots)
        bridged = self.aggregator(z_btpc[:, :-1], slots[:, 1:]) if bridge else None
        rolled = None
        if rollout_steps:
            start = z_btpc.shape[1] - rollout_steps
            rolled = self.rollout(z_btpc[:, start - 1], slots[:, :start], actions.sample)
        return Prediction(slots, masks, actions, next_slots, next_z, bridged), rolled

    def rollout(self, z: Tensor, slots: Tensor, actions: Tensor) -> Tensor:
        """Features [B, S, P, C] of S steps in slot space.

        z [B, P, C] and slots [B, t, K, D] are those of the frames known so far; actions [B, t - 1 + S, K, A] lead from
        the first of them to the last step.
        """
        predicted = []
        steps = actions.shape[1] - slots.shape[1] + 1
        for _ in range(steps):
            recent = slots[:, -self.config.temporal_window :]
            past = actions[:, : slots.shape[1]][:, -recent.shape[1] :]
            following = self.forward_dynamics(recent, past)[:, -1:]
            z = self.aggregator(z[:, None], following)[:, 0]
            slots = torch.cat([slots, following], dim=1)
            predicted.append(z)
        return torch.stack(predicted, dim=1)


class Flam(nn.Module):
    """A trained (or fresh) model: `encode`, `slots`, `infer_actions`, `rollout`, `decode`.

    Frames go in as uint8 [..., H, W, 3] and come out as float [..., H, W, 3] in [0, 1].
    """

    def __init__(self, tokenizer: TokenizerConfig, model: ModelConfig) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(tokenizer)
        self.dynamics = Dynamics(model, tokenizer)

    @property
    def factors(self) -> int:
        """K."""
        return self.dynamics.config.factors

    @torch.no_grad()
    def encode(self, frames_u8: Tensor) -> Tensor:
        """Features z [B, T, P, C] of uint8 frames [B, T, H, W, 3]."""
        return self.tokenizer.encode(frames_u8)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Frames [B, T, H, W, 3] in [0, 1] of features [B, T, P, C]."""
        return self.tokenizer.decode(z).clamp(0, 1)

    @torch.no_grad()
    def slots(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, T, K, D] and masks [B, T, K, P] of features [B, T, P, C]."""
        return self.dynamics.factorizer(z)

    @torch.no_grad()
    def infer_actions(self, slots: Tensor) -> Tensor:
        """Latent actions (posterior mean, or codes' vectors) [B, T - 1, K, A] of slots [B, T, K, D]."""
        return self.dynamics.inverse(slots).mean

    @torch.no_grad()
    def sample_actions(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Latent actions [*shape, A] drawn from the prior."""
        return self.dynamics.inverse.latent.prior(shape, generator)

    @torch.no_grad()
    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: Literal["slots", "frames"] = "slots") -> Tensor:
        """Frames float [B, S, H, W, 3] in [0, 1] that follow the t given ones under the given latent actions.

        frames_u8: uint8 [B, t, H, W, 3]. actions: [B, t - 1 + S, K, A], from the first given frame on.
        feedback: "slots" predicts slots from slots; "frames" draws each predicted frame and reads its slots anew.
        """
        z = self.encode(frames_u8)
        if feedback == "slots":
            return self.decode(self.dynamics.rollout(z[:, -1], self.slots(z)[0], actions))
        drawn = []
        for _ in range(actions.shape[1] - z.shape[1] + 1):
            recent = z[:, -self.dynamics.config.temporal_window :]
            past = actions[:, : z.shape[1]][:, -recent.shape[1] :]
            following = self.dynamics.forward_dynamics(self.slots(recent)[0], past)[:, -1:]
            frame = self.decode(self.dynamics.aggregator(z[:, -1:], following))
            drawn.append(frame)
            z = torch.cat([z, self.encode((frame * 255).round().to(torch.uint8))], dim=1)
        return torch.cat(drawn, dim=1)
