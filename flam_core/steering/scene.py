"""A scene that is steered: it takes one latent action a slot and gives the next frame, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flam_core.errors import DataError, SettingsError
from flam_core.model import Flam
from flam_core.model.places import centres

Feedback = Literal["frames", "slots"]
"""What a step builds on: the frame that was drawn, which is read again, or the slots that were predicted."""


@dataclass(frozen=True, eq=False)
class SceneState:
    """Where a scene stands: what `Scene.snapshot` gives and `Scene.restore` takes. No longer than the model's window.

    frames: uint8 [w, H, W, 3]. z: float32 [1, w, P, C]. slots: float32 [1, w, K, D]. actions: float32 [1, w - 1, K, A].
    masks: float32 [K, P] of the last frame, and places: [K, 2]; None where they were not asked for.
    """

    frames: Tensor
    z: Tensor
    slots: Tensor
    actions: Tensor
    masks: Tensor | None
    places: Tensor | None
    steps: int


class Scene:
    """A scene that is steered one step at a time: a batch of one.

    Bit for bit what `Flam.rollout` gives for the same actions and the same feedback.
    """

    def __init__(
        self, model: Flam, frames_u8: Tensor, feedback: Feedback = "frames", known_actions: Tensor | None = None
    ) -> None:
        """frames_u8: uint8 [t, H, W, 3], what is known, t >= 1. known_actions: float32 [t - 1, K, A], between those
        frames; by default what the model infers.

        Raises DataError for frames or actions of another size or type, SettingsError if the model cannot infer actions.
        """
        self.model, self.feedback = model, feedback
        self._window = model.dynamics.config.temporal_window
        self._device = next(model.parameters()).device
        _check_frames(frames_u8, model.tokenizer.config.frame_size)
        known = frames_u8[None].to(self._device)
        self.known_actions = self._known(known, known_actions)
        z = model.encode(known)
        if feedback == "frames":
            z = z[:, -self._window :]
        slots, masks, weights = model.look(z)
        self._state = SceneState(
            frames=frames_u8[-self._window :].cpu(),
            z=z[:, -self._window :],
            slots=slots[:, -self._window :],
            actions=self.known_actions[None, -self._window :],
            **_seen(masks, weights),
            steps=0,
        )

    @property
    def frame(self) -> Tensor:
        """The latest frame, given or drawn: uint8 [H, W, 3], on the CPU."""
        return self._state.frames[-1]

    @property
    def steps(self) -> int:
        """Steps taken since the start."""
        return self._state.steps

    @property
    def masks(self) -> Tensor | None:
        """How the patches of the latest frame are shared out: float32 [K, P]. None for a model without slots."""
        return self._looked().masks

    @property
    def places(self) -> Tensor | None:
        """Where each slot is in the latest frame: float32 [K, 2], (x, y) in shares of the frame's side, y down, on the
        CPU. None for a model without slots."""
        return self._looked().places

    def _looked(self) -> SceneState:
        if self._state.masks is None and self.model.has_slots:
            # Predicted slots have no masks: the drawn frame is looked at, but nothing builds on what is seen.
            _, masks, weights = self.model.look(self.model.encode(self._state.frames[None].to(self._device)))
            self._state = replace(self._state, **_seen(masks, weights))
        return self._state

    @torch.no_grad()
    def step(self, actions: Tensor) -> Tensor:
        """Take latent actions float32 [K, A]; the frame that follows, uint8 [H, W, 3], on the CPU.

        Raises DataError for actions of another shape, or not finite.
        """
        state, model = self._state, self.model
        self._check_actions(actions)
        taken = torch.cat([state.actions, actions[None, None].to(self._device, torch.float32)], dim=1)
        taken = taken[:, -self._window :]
        next_z, following = model.dynamics.step(state.z[:, -1], state.slots, taken[:, -state.slots.shape[1] :])
        drawn = (model.decode(next_z) * 255).round().to(torch.uint8)
        masks = weights = None
        if self.feedback == "slots":
            z, slots = next_z, torch.cat([state.slots, following], dim=1)[:, -self._window :]
        else:
            z = torch.cat([state.z, model.encode(drawn)], dim=1)[:, -self._window :]
            slots, masks, weights = model.look(z)
        self._state = SceneState(
            frames=torch.cat([state.frames, drawn[0].cpu()])[-self._window :],
            z=z,
            slots=slots,
            actions=taken,
            **_seen(masks, weights),
            steps=state.steps + 1,
        )
        return self.frame

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latent actions [K, A] for the next step, drawn from the learned prior as `Flam.imagine` does.

        Raises SettingsError for a model without latent actions of its own.
        """
        state = self._state
        drawn = self.model.sample_next_actions(state.slots, generator)
        if self.feedback == "frames":
            drawn = self.model.settled(state.z, state.slots, state.actions, drawn)
        return drawn[0]

    @torch.no_grad()
    def peek(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """What one step with each of N latent actions float32 [N, K, A] would give, taking none of them.

        The frames uint8 [N, H, W, 3], and where slots are in them, float32 [N, K, 2] as in `places`; both on the CPU.
        """
        state, model, count = self._state, self.model, len(actions)
        taken = torch.cat([state.actions.expand(count, -1, -1, -1), actions[:, None].to(self._device)], dim=1)
        z, slots = (x.expand(count, *x.shape[1:]) for x in (state.z, state.slots))
        next_z, _ = model.dynamics.step(z[:, -1], slots, taken[:, -slots.shape[1] :])
        drawn = (model.decode(next_z) * 255).round().to(torch.uint8)
        weights = None
        if model.has_slots:
            weights = model.look(torch.cat([z, model.encode(drawn)], dim=1)[:, -self._window :])[2]
        return drawn[:, 0].cpu(), None if weights is None else centres(weights[:, -1]).cpu()

    def snapshot(self) -> SceneState:
        """Where the scene stands; nothing changes it."""
        return self._state

    def restore(self, state: SceneState) -> None:
        """Stand again where `snapshot` was taken, of this scene or of one with the same model and feedback."""
        self._state = state

    def _known(self, frames: Tensor, actions: Tensor | None) -> Tensor:
        """Latent actions [t - 1, K, A] between the known frames [1, t, H, W, 3]."""
        config, between = self.model.dynamics.config, frames.shape[1] - 1
        shape = (between, self.model.factors, config.action_dim)
        if actions is not None:
            if tuple(actions.shape) != shape:
                raise DataError(
                    f"known actions are {_shape(actions)}, and {between + 1} frames need {list(shape)}",
                    fix="Give the actions that lead from each known frame to the next.",
                )
            return actions.to(self._device, torch.float32)
        if not between:
            return torch.empty(shape, device=self._device)
        if config.latent == "true":
            raise SettingsError(
                "a model of true actions infers none from frames", fix="Start from one frame, or use another model."
            )
        return self.model.infer_actions(self.model.slots(self.model.encode(frames))[0])[0]

    def _check_actions(self, actions: Tensor) -> None:
        shape = [self.model.factors, self.model.dynamics.config.action_dim]
        if list(actions.shape) != shape:
            raise DataError(f"latent actions are {_shape(actions)}, not {shape}", fix="Give one a slot.")
        if not actions.isfinite().all():
            raise DataError("latent actions are not finite", fix="Give numbers, not NaN or infinity.")


def check_own_actions(model: Flam) -> None:
    """Raises SettingsError for a model without latent actions of its own, which could be found, changed or carried."""
    latent = model.dynamics.config.latent
    if latent in ("none", "true"):
        raise SettingsError(
            f"a model with latent {latent!r} has no latent actions of its own",
            fix="Use a model with gaussian or vq latent actions.",
        )


def _seen(masks: Tensor | None, weights: Tensor | None) -> dict[str, Tensor | None]:
    """A state's masks and places, of those of a batch of one."""
    if masks is None or weights is None:
        return {"masks": None, "places": None}
    return {"masks": masks[0, -1].float(), "places": centres(weights[0, -1]).cpu()}


def _check_frames(frames: Tensor, size: int) -> None:
    if frames.dtype != torch.uint8:
        raise DataError(f"frames are {frames.dtype}, not uint8", fix="Give pixels from 0 to 255.")
    if frames.ndim != 4 or len(frames) < 1 or list(frames.shape[1:]) != [size, size, 3]:
        raise DataError(
            f"frames are {_shape(frames)}, and this model takes [t, {size}, {size}, 3] with t >= 1",
            fix=f"Scale them to {size}x{size} pixels, RGB.",
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
