"""FLAM's rivals and ablations (flam-spec: baselines; the ablation table) as changes of a config.

Each keeps the tokenizer, the training stages and the total width of the latent actions, so that one program and one
loop train them all: `jobs/train.py tiny --variant monolithic-vq`. Rivals without slots get a width that makes them as
large as the FLAM that they are measured against.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from flam_core.config import Config, ModelConfig, TokenizerConfig
from flam_core.errors import SettingsError
from flam_core.model.flam import make_dynamics

TrueActions = tuple[int, int, int]
"""Entities, numbers of an entity's action, and kinds of a discrete action: `ModelConfig.true_actions`."""


def flam(config: Config) -> Config:
    """As it is."""
    return config


def flam_vq(config: Config) -> Config:
    """FLAM with discrete latent actions, one codebook for all slots."""
    return _with(config, latent="vq")


def monolithic_gaussian(config: Config) -> Config:
    """One Gaussian latent action for the whole scene, dynamics on patches (AdaWorld-type)."""
    return _without_slots(config, latent="gaussian", factors=1)


def monolithic_vq(config: Config) -> Config:
    """One code for the whole scene, dynamics on patches (Genie-type)."""
    return _without_slots(config, latent="vq", factors=1)


def grouped(config: Config) -> Config:
    """As many latent actions as FLAM has, read from and acting on the whole frame: factored latents without slots."""
    return _without_slots(config)


def playslot(config: Config) -> Config:
    """Slots that are trained by reconstruction alone, and a code for each from its own two values (PlaySlot-type)."""
    loss = replace(config.loss, bridge=max(config.loss.bridge, 1.0))
    seen = replace(config, loss=loss, slot_hold=0.0)
    return _with(seen, latent="vq", coupling="own", slot_training="apart", motion_readout=False)


def slotformer(config: Config) -> Config:
    """Slots without any action (SlotFormer-type): what can be known of the future without being told."""
    return _with(config, latent="none", motion_readout=False)


def true_actions(config: Config, actions: TrueActions) -> Config:
    """Dynamics on patches given the data set's true actions: what action labels would buy."""
    return _without_slots(config, latent="true", factors=1, true_actions=actions)


def no_temporal(config: Config) -> Config:
    """No temporal attention in the factorizer: slots start from the previous frame's."""
    return _with(config, slot_time="recurrent")


def global_coupled(config: Config) -> Config:
    """The inverse dynamics sees all next slots, the forward dynamics all actions."""
    return _with(config, coupling="global")


def no_motion(config: Config) -> Config:
    """Nothing reads off latent actions how slots move: the paper's."""
    return _with(config, motion_readout=False)


TRUE_ACTIONS = "true-actions"
"""The one variant that sees ground truth while training."""
_VARIANTS: dict[str, Callable[[Config], Config]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        flam,
        flam_vq,
        monolithic_gaussian,
        monolithic_vq,
        grouped,
        playslot,
        slotformer,
        no_temporal,
        global_coupled,
        no_motion,
    )
}


VARIANTS = (*_VARIANTS, TRUE_ACTIONS)
"""All names."""


def apply_variant(config: Config, name: str, actions: TrueActions | None = None) -> Config:
    """The config of a variant; `actions` describes the data set's true ones.

    Raises SettingsError, with the nearest name, if there is no such variant, or if it needs true actions and there are
    none.
    """
    if name == TRUE_ACTIONS:
        if actions is None:
            raise SettingsError(
                "variant true-actions, and the data set has no true actions",
                fix="Ingest a world, or video with actions.",
            )
        return replace(true_actions(config, actions), variant=name)
    if name not in _VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise SettingsError(f"unknown variant {name!r}", fix=f"{hint}Variants: {', '.join(VARIANTS)}.")
    return replace(_VARIANTS[name](config), variant=name)


def dynamics_weights(model: ModelConfig, tokenizer: TokenizerConfig) -> int:
    """Trained weights of stage 2, but for the learned prior and what reads motion off latent actions: no prediction
    rests on these."""
    with torch.device("meta"):
        dynamics = make_dynamics(model, tokenizer)
    return sum(p.numel() for name, p in dynamics.named_parameters() if not name.startswith(("prior.", "motion.")))


@lru_cache
def equal_weights(model: ModelConfig, tokenizer: TokenizerConfig, target: int) -> ModelConfig:
    """`model` with the width, a multiple of the heads, that brings `dynamics_weights` nearest to `target`."""
    low, high = 1, 16 * model.width // model.heads  # channels a head; weights grow with them
    while low < high:
        middle = (low + high) // 2
        if dynamics_weights(replace(model, width=middle * model.heads), tokenizer) < target:
            low = middle + 1
        else:
            high = middle
    near = [replace(model, width=channels * model.heads) for channels in (max(1, low - 1), low)]
    return min(near, key=lambda one: abs(dynamics_weights(one, tokenizer) - target))


def _with(config: Config, **model: object) -> Config:
    return replace(config, model=replace(config.model, **model))  # pyright: ignore[reportArgumentType] - by name


def _without_slots(config: Config, **changes: object) -> Config:
    """A rival without slots, as large as the FLAM of `config`.

    Latent actions are never frozen: where FLAM's are settled, a rival's still get better (docs/devlog.md, 30 November).
    """
    target = dynamics_weights(config.model, config.tokenizer)
    model = replace(config.model, state="patches", motion_readout=False, slot_place=False, **changes)  # pyright: ignore[reportArgumentType] - by name
    model = equal_weights(model, config.tokenizer, target)
    loss = replace(config.loss, bridge=0.0, slot_prediction=0.0)
    return replace(config, model=model, loss=loss, slot_hold=0.0, latent_freeze=1.0)
