"""What one does with a world model: draw a clip again, edit one slot of it, imagine futures, carry actions over.

Each gives a `Film`: a start, the latent actions that were taken from it, and the frames that came of them. Whoever
takes the same actions from the same start with the same model gets the same frames, bit for bit (`replay`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flam_core.errors import DataError, SettingsError
from flam_core.model import Flam
from flam_core.steering.directions import Examples, directed
from flam_core.steering.scene import Feedback, Scene, check_own_actions

MOST_STEPS = 500
"""Steps of a film at most: all its pictures are drawn."""


@dataclass(frozen=True, eq=False)
class Film:
    """S steps from t given frames.

    start: uint8 [t, H, W, 3]. known: float32 [t - 1, K, A], the latent actions between them. actions: float32 [S, K,
    A], those that were taken. frames: uint8 [S, H, W, 3], what came of them. masks: float32 [t + S, K, P], of all
    frames; None for a model without slots.
    """

    start: Tensor
    known: Tensor
    actions: Tensor
    frames: Tensor
    masks: Tensor | None

    @property
    def all_frames(self) -> Tensor:
        """uint8 [t + S, H, W, 3]."""
        return torch.cat([self.start, self.frames])


Choose = Callable[[Scene, int], Tensor]
"""The latent actions [K, A] that a scene takes next, at a step counted from 0."""


def film(
    model: Flam, start: Tensor, steps: int, choose: Choose, *, feedback: Feedback, known: Tensor | None = None
) -> Film:
    """Take `steps` steps from the frames `start`, uint8 [t, H, W, 3].

    known: float32 [t - 1, K, A], by default what the model infers. Raises SettingsError for a number of steps that is
    none, DataError for frames of another size.
    """
    check_steps(steps)
    scene = Scene(model, start, feedback, known)
    taken, frames, masks = [], [], []
    if model.has_slots:
        masks += list(_masks(model, start))
    for step in range(steps):
        taken.append(choose(scene, step).float())
        frames.append(scene.step(taken[-1]))
        if scene.masks is not None:
            masks.append(scene.masks.cpu())
    return Film(
        start=start.cpu(),
        known=scene.known_actions.float().cpu(),
        actions=torch.stack(taken).cpu(),
        frames=torch.stack(frames),
        masks=torch.stack(masks) if masks else None,
    )


def reconstruct(model: Flam, clip: Tensor, context: int, steps: int, *, feedback: Feedback) -> Film:
    """The clip uint8 [T, H, W, 3] drawn again from its first `context` frames and the latent actions inferred from all.

    Raises DataError for a clip that is too short, SettingsError for a context or steps that cannot be.
    """
    inferred = infer(model, clip, context, steps)
    return film(
        model,
        clip[:context],
        steps,
        follow(inferred[context - 1 :]),
        feedback=feedback,
        known=inferred[: context - 1],
    )


def edit(
    model: Flam, clip: Tensor, context: int, steps: int, slot: int, replace: Choose, *, feedback: Feedback
) -> Film:
    """As `reconstruct`, but the latent action of `slot` is that which `replace` gives; the others' are as inferred.

    Raises as `reconstruct`, and SettingsError for a slot that there is not and a model without latent actions of its
    own.
    """
    check_slot(model, slot)
    check_own_actions(model)
    inferred = infer(model, clip, context, steps)

    def choose(scene: Scene, step: int) -> Tensor:
        actions = inferred[context - 1 + step].clone()
        actions[slot] = replace(scene, step)[slot].to(actions.device)
        return actions

    return film(model, clip[:context], steps, choose, feedback=feedback, known=inferred[: context - 1])


def imagine(model: Flam, start: Tensor, steps: int, seed: int, *, feedback: Feedback) -> Film:
    """A future of the frames `start` that nobody has seen: all latent actions are drawn from the learned prior.

    Raises SettingsError for a model without latent actions of its own.
    """
    return film(model, start, steps, prior(seed), feedback=feedback)


def transfer(model: Flam, start: Tensor, other: Tensor, context: int, steps: int, *, feedback: Feedback) -> Film:
    """What the slots do in the clip `other`, done in the scene `start` instead.

    Raises as `reconstruct`, and SettingsError for a model without latent actions of its own: nothing is carried over.
    """
    check_own_actions(model)
    check_given(start, context)
    inferred = infer(model, other, context, steps)
    return film(model, start[:context], steps, follow(inferred[context - 1 :]), feedback=feedback)


def replay(model: Flam, start: Tensor, known: Tensor | None, actions: Tensor, *, feedback: Feedback) -> Film:
    """The film of latent actions [S, K, A] again. Raises DataError for actions that are not this model's."""
    return film(model, start, len(actions), follow(actions), feedback=feedback, known=known)


def prior(seed: int) -> Choose:
    """Actions drawn from the learned prior."""
    generator = torch.Generator().manual_seed(seed)
    return lambda scene, _: scene.sample(generator)


def follow(actions: Tensor) -> Choose:
    """Actions float32 [S, K, A] one after the other."""
    return lambda _, step: actions[step]


def go(slot: int, direction: str, examples: Examples, others: Tensor) -> Choose:
    """A slot goes one way wherever it stands (`directed`), while the others do the actions float32 [S, K, A]."""

    def choose(scene: Scene, step: int) -> Tensor:
        actions = others[step].cpu().clone()
        actions[slot] = directed(scene, slot, direction, examples, actions).action
        return actions

    return choose


def infer(model: Flam, clip: Tensor, context: int, steps: int) -> Tensor:
    """Latent actions [context - 1 + steps, K, A] of a clip uint8 [T, H, W, 3].

    Raises DataError if it is too short, SettingsError for a model that infers none.
    """
    check_steps(steps)
    if context < 1:
        raise SettingsError(f"context = {context}", fix="Give at least 1 true frame.")
    if model.dynamics.config.latent == "true":
        raise SettingsError(
            "a model of true actions infers none from frames", fix="Use a model with gaussian or vq latent actions."
        )
    needed = context + steps
    if len(clip) < needed:
        raise DataError(
            f"the clip has {len(clip)} frames, and {context} given + {steps} steps need {needed}",
            fix="Give a longer clip, fewer --steps, or --mode free, which needs one frame.",
        )
    seen = clip[None, :needed].to(next(model.parameters()).device)
    return model.infer_actions(model.slots(model.encode(seen))[0])[0]


def check_steps(steps: int) -> None:
    """Raises SettingsError for a number of steps that is none, or beyond MOST_STEPS."""
    if not 1 <= steps <= MOST_STEPS:
        raise SettingsError(f"steps = {steps}", fix=f"Choose 1 to {MOST_STEPS}.")


def check_given(clip: Tensor, context: int) -> None:
    """Raises DataError for a clip that has not so many frames to start from."""
    if len(clip) < context:
        raise DataError(
            f"the clip has {len(clip)} frames, and {context} are to be given",
            fix="Lower --context, or give a longer clip.",
        )


def check_slot(model: Flam, slot: int) -> None:
    """Raises SettingsError for a slot that there is not, and for a model without slots."""
    if not model.has_slots:
        raise SettingsError(
            "this model has no slots: its latent actions act on the whole frame",
            fix="Use a model with model.state slots, or --mode free or transfer.",
        )
    if not 0 <= slot < model.factors:
        raise SettingsError(
            f"the model has no slot {slot}", fix=f"Its slots are {', '.join(map(str, range(model.factors)))}."
        )


def frames_digest(frames_u8: Tensor) -> str:
    """sha256, in hex, of frames uint8 [T, H, W, 3] and their shape."""
    shape = "x".join(map(str, frames_u8.shape))
    return hashlib.sha256(shape.encode() + frames_u8.contiguous().cpu().numpy().tobytes()).hexdigest()


def _masks(model: Flam, frames: Tensor) -> Tensor:
    """float32 [t, K, P] of given frames."""
    found = model.slots(model.encode(frames[None].to(next(model.parameters()).device)))[1]
    assert found is not None  # asked for models with slots alone
    return found[0].float().cpu()
