"""FLAM: the tokenizer and the four parts together, and what one does with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.errors import SettingsError
from flam_core.model.dynamics import Aggregator, ForwardDynamics, InverseDynamics
from flam_core.model.factorizer import Factorizer
from flam_core.model.latent_action import LatentActions
from flam_core.model.patches import PatchDynamics
from flam_core.model.places import ALL, FOCUS, MotionReadout, moves
from flam_core.model.prediction import Prediction
from flam_core.model.prior import ActionPrior
from flam_core.model.tokenizer import Tokenizer

_SETTLING = 2
"""Rounds of `Flam.settled`: the first gains most, four no more than two (docs/devlog.md)."""


class Dynamics(nn.Module):
    """Factorizer, inverse dynamics, forward dynamics and aggregator: what stage 2 trains."""

    def __init__(self, config: ModelConfig, tokenizer: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.factorizer = Factorizer(config, tokenizer.feature_dim, tokenizer.grid)
        self.inverse = InverseDynamics(config)
        self.forward_dynamics = ForwardDynamics(config)
        self.aggregator = Aggregator(config, tokenizer.feature_dim, self.factorizer.position)
        self.prior = None if config.latent == "none" else ActionPrior(config, config.width)
        self.motion = MotionReadout(config.action_dim) if config.motion_readout else None

    @property
    def latent(self) -> nn.Module:
        """The bottleneck."""
        return self.inverse.latent

    def state(self, z_btpc: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, T, K, D] and masks [B, T, K, P] of features [B, T, P, C]."""
        return self.factorizer(z_btpc)

    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        """Latent actions of the transitions between slots [B, T, K, D]; true ones are not looked at."""
        return self.inverse(slots)

    def step(self, z: Tensor, slots: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 1, P, C] and slots [B, 1, K, D] of the frame after slots [B, t, K, D].

        z: [B, P, C], of the last frame. actions: [B, t, K, A].
        """
        following = self.forward_dynamics(slots, actions)[:, -1:]
        return self.aggregator(z[:, None], following), following

    def forward(
        self, z_btpc: Tensor, rollout_steps: int = 0, bridge: bool = False, true_actions: Tensor | None = None
    ) -> tuple[Prediction, Tensor | None]:
        """Predict each frame's features from those before it and the inferred actions.

        With `rollout_steps` also returns the features [B, rollout_steps, P, C] of the last frames, rolled out in slot
        space from the frame before them.
        """
        slots, masks, weights = self.factorizer.look(z_btpc)
        bridged = self.aggregator(z_btpc[:, :-1], slots[:, 1:]) if bridge else None
        if self.config.slot_training == "apart":
            slots = slots.detach()
        actions = self.infer(slots, true_actions)
        next_slots = self.forward_dynamics(slots[:, :-1], actions.sample)
        next_z = self.aggregator(z_btpc[:, :-1], next_slots)
        rolled = None
        if rollout_steps:
            start = z_btpc.shape[1] - rollout_steps
            rolled = self.rollout(z_btpc[:, start - 1], slots[:, :start], actions.sample)
        nll = None if self.prior is None else self.prior(slots[:, :-1], actions)
        motion = None
        if self.motion is not None:
            motion = self.motion(actions.sample, moves(weights, ALL if self.config.slot_place else FOCUS))
        return Prediction(slots, masks, actions, next_slots, next_z, bridged, nll, motion), rolled

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
            next_z, following = self.step(z, recent, past)
            z = next_z[:, 0]
            slots = torch.cat([slots, following], dim=1)
            predicted.append(z)
        return torch.stack(predicted, dim=1)


def make_dynamics(config: ModelConfig, tokenizer: TokenizerConfig) -> Dynamics | PatchDynamics:
    """Stage 2 as the config asks for it: FLAM and its ablations, or a rival without slots."""
    return PatchDynamics(config, tokenizer) if config.state == "patches" else Dynamics(config, tokenizer)


class Flam(nn.Module):
    """A trained (or fresh) model: `encode`, `slots`, `infer_actions`, `rollout`, `decode`.

    Frames go in as uint8 [..., H, W, 3] and come out as float [..., H, W, 3] in [0, 1].
    """

    def __init__(self, tokenizer: TokenizerConfig, model: ModelConfig) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(tokenizer)
        self.dynamics = make_dynamics(model, tokenizer)

    @property
    def factors(self) -> int:
        """K: latent actions of a transition. FLAM has as many slots."""
        return self.dynamics.config.factors

    @property
    def has_slots(self) -> bool:
        """False for the rivals whose state is the grid of features."""
        return isinstance(self.dynamics, Dynamics)

    @torch.no_grad()
    def encode(self, frames_u8: Tensor) -> Tensor:
        """Features z [B, T, P, C] of uint8 frames [B, T, H, W, 3]."""
        return self.tokenizer.encode(frames_u8)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Frames [B, T, H, W, 3] in [0, 1] of features [B, T, P, C]."""
        return self.tokenizer.decode(z).clamp(0, 1)

    @torch.no_grad()
    def slots(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Slots [B, T, K, D] and masks [B, T, K, P] of features [B, T, P, C]; z itself and None without slots."""
        return self.dynamics.state(z)

    @torch.no_grad()
    def look(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `slots`, and what each slot reads, [B, T, K, P]: weights over the patches, sharper than its mask."""
        if isinstance(self.dynamics, Dynamics):
            return self.dynamics.factorizer.look(z)
        return (*self.dynamics.state(z), None)

    @torch.no_grad()
    def infer_actions(self, slots: Tensor, true_actions: Tensor | None = None) -> Tensor:
        """Latent actions (posterior mean, or codes' vectors) [B, T - 1, K, A] of slots [B, T, K, D].

        true_actions: float32 [B, T, N, S], for a model of true actions.
        """
        return self.infer(slots, true_actions).mean

    @torch.no_grad()
    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        """As `infer_actions`, with what the bottleneck says of them: nats, and numbers of codes."""
        return self.dynamics.infer(slots, true_actions)

    @torch.no_grad()
    def sample_actions(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Latent actions [*shape, A] drawn from the fixed prior: N(0, I), or codes at random. `shape` ends with K."""
        return self.dynamics.latent.prior(shape, generator)  # type: ignore[operator]

    @torch.no_grad()
    def sample_next_actions(self, slots: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latent actions [B, K, A] for the last frame of slots [B, t, K, D], drawn from the learned prior.

        Raises SettingsError for a model without latent actions of its own.
        """
        if self.dynamics.prior is None:
            raise SettingsError(
                f"a model with latent {self.dynamics.config.latent!r} has no prior to draw actions from",
                fix="Give it actions, or use a model with gaussian or vq latent actions.",
            )
        window = self.dynamics.config.temporal_window
        return self.dynamics.prior.sample(slots[:, -window:], self.dynamics.latent, generator)

    @torch.no_grad()
    def settled(self, z: Tensor, slots: Tensor, taken: Tensor, actions: Tensor) -> Tensor:
        """Latent actions [B, K, A] near given ones [B, K, A] that the model itself would infer: it draws the frame that
        they lead to, reads it, and takes what it infers between the two, twice. The paper has none of this.

        Inferred latent actions lie in tight clusters, a move from a place, and a draw from the learned prior often lies
        beside them, where the dynamics was never trained (docs/devlog.md, 1 December 2026).

        z: [B, t, P, C]. slots: [B, t, K, D] of the same frames. taken: [B, t - 1 or more, K, A], up to the last frame.
        """
        window = self.dynamics.config.temporal_window
        z, slots = z[:, -window:], slots[:, -window:]
        for _ in range(_SETTLING):
            path = torch.cat([taken, actions[:, None]], dim=1)[:, -slots.shape[1] :]
            next_z, _ = self.dynamics.step(z[:, -1], slots, path)
            seen = self.encode((self.decode(next_z) * 255).round().to(torch.uint8))
            actions = self.infer_actions(self.slots(torch.cat([z, seen], dim=1))[0])[:, -1]
        return actions

    @torch.no_grad()
    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: Literal["slots", "frames"] = "slots") -> Tensor:
        """Frames float [B, S, H, W, 3] in [0, 1] that follow the t given ones under the given latent actions.

        frames_u8: uint8 [B, t, H, W, 3]. actions: [B, t - 1 + S, K, A], from the first given frame on.
        feedback: "slots" predicts slots from slots; "frames" draws each predicted frame and reads its slots anew.
        """
        known = frames_u8.shape[1] - 1
        frames, _ = self._roll(frames_u8, actions, actions.shape[1] - known, feedback, None)
        return frames

    @torch.no_grad()
    def imagine(
        self,
        frames_u8: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
        feedback: Literal["slots", "frames"] = "slots",
    ) -> tuple[Tensor, Tensor]:
        """A future that nobody has seen: frames float [B, S, H, W, 3] in [0, 1] and the latent actions [B, t - 1 + S,
        K, A] that lead to them, drawn step by step from the learned prior (and `settled` where frames are drawn).

        frames_u8: uint8 [B, t, H, W, 3]. Raises SettingsError for a model without latent actions of its own.
        """
        return self._roll(frames_u8, None, steps, feedback, generator)

    def _roll(
        self,
        frames_u8: Tensor,
        actions: Tensor | None,
        steps: int,
        feedback: Literal["slots", "frames"],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """`rollout` with given actions, `imagine` without."""
        window = self.dynamics.config.temporal_window
        z = self.encode(frames_u8)
        known = z.shape[1] - 1
        if feedback == "frames":
            z = z[:, -window:]
        slots = self.slots(z)[0]
        if actions is not None:
            taken = actions[:, :known]
        elif known:
            taken = self.infer_actions(self.slots(self.encode(frames_u8))[0])
        else:
            taken = slots.new_empty(len(slots), 0, self.factors, self.dynamics.config.action_dim)
        drawn = []
        for i in range(known, known + steps):
            if actions is not None:
                last = actions[:, i]
            elif feedback == "frames":
                last = self.settled(z, slots, taken, self.sample_next_actions(slots, generator))
            else:
                last = self.sample_next_actions(slots, generator)
            taken = torch.cat([taken, last[:, None]], dim=1)
            recent = slots[:, -window:]
            next_z, following = self.dynamics.step(z[:, -1], recent, taken[:, -recent.shape[1] :])
            frame = self.decode(next_z)
            drawn.append(frame)
            if feedback == "slots":
                z, slots = next_z, torch.cat([slots, following], dim=1)
            else:
                z = torch.cat([z, self.encode((frame * 255).round().to(torch.uint8))], dim=1)[:, -window:]
                slots = self.slots(z)[0]
        return torch.cat(drawn, dim=1), taken

    def pruned(self, keep: list[int]) -> Flam:
        """This model with some of its slots only, in that order: slots share all weights but their starts.

        Raises SettingsError for a model without slots.
        """
        if not self.has_slots:
            raise SettingsError("a model without slots has none to prune", fix="Use one with model.state slots.")
        config = self.dynamics.config
        smaller = replace(config, factors=len(keep), latent_width=len(keep) * config.action_dim)
        like = next(self.parameters())
        model = Flam(self.tokenizer.config, smaller).to(like.device, like.dtype)
        weights = self.state_dict()
        for name in ("factorizer.initial", "factorizer.looked_for", "inverse.latent.centre"):
            if f"dynamics.{name}" in weights:
                weights[f"dynamics.{name}"] = weights[f"dynamics.{name}"][keep]
        model.load_state_dict(weights)
        return model.train(self.training)
