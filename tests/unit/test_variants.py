"""Rivals and ablations: what each may see, proved by gradients as for FLAM, and that one loop trains them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flam_core.config import Config, LossConfig, ModelConfig
from flam_core.errors import SettingsError
from flam_core.learning.trainer import Trainer
from flam_core.model import Dynamics, Flam, PatchDynamics
from flam_core.model.dynamics import ForwardDynamics, InverseDynamics
from flam_core.model.factorizer import Factorizer
from flam_core.recipes import get_recipe
from flam_core.variants import TRUE_ACTIONS, VARIANTS, apply_variant, dynamics_weights
from tests.unit.test_dependencies import (
    ACTION,
    CHANNELS,
    FACTORS,
    FRAMES,
    TOKENIZER,
    WIDTH,
    assert_depends_exactly_on,
    config,
    same_slot,
    shaken,
    source,
    strengths,
    t_in,
    t_out,
)
from tests.unit.test_trainer import CONFIG

GRID_ACTIONS = (3, 1, 5)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def patches(**changes: Any) -> PatchDynamics:
    return shaken(PatchDynamics(config(state="patches", **changes), TOKENIZER))


# --- what each may see ---


def test_with_own_coupling_an_action_depends_on_its_own_track_alone() -> None:
    inverse = shaken(InverseDynamics(config(coupling="own", temporal_window=2)))
    slots = source(2, FRAMES, FACTORS, WIDTH)
    own = same_slot & (t_in <= t_out + 1) & (t_in >= t_out)
    assert_depends_exactly_on(own[:-1], strengths(inverse(slots).sample, slots))


def test_global_coupling_sees_all_next_slots_and_moves_all() -> None:
    settings = config(coupling="global")
    inverse, forward = shaken(InverseDynamics(settings)), shaken(ForwardDynamics(settings))
    slots, actions = source(2, FRAMES, FACTORS, WIDTH), source(2, FRAMES, FACTORS, ACTION)
    everything = (t_in <= t_out + 1) & (same_slot | ~same_slot)
    assert_depends_exactly_on(everything[:-1], strengths(inverse(slots).sample, slots))
    so_far = (t_in <= t_out) & (same_slot | ~same_slot)
    assert_depends_exactly_on(so_far, strengths(forward(slots, actions), actions))


def test_recurrent_slots_depend_on_all_frames_so_far() -> None:
    factorizer = shaken(Factorizer(config(slot_time="recurrent", temporal_window=2), CHANNELS, TOKENIZER.grid))
    z = source(2, FRAMES, TOKENIZER.patches, CHANNELS)
    slots, masks = factorizer(z)
    assert_depends_exactly_on((t_in <= t_out)[..., :1], strengths(slots, z).amax(dim=-1, keepdim=True))
    assert torch.allclose(masks.sum(dim=2), torch.ones_like(masks[:, :, 0]))


def test_slots_trained_apart_get_their_gradient_from_the_bridge_alone() -> None:
    dynamics = shaken(Dynamics(config(slot_training="apart"), TOKENIZER))
    z = torch.randn(2, FRAMES, TOKENIZER.patches, CHANNELS, dtype=torch.float64)
    prediction, _ = dynamics(z, bridge=True)
    factorizer = [p for name, p in dynamics.factorizer.named_parameters() if not name.startswith("position")]
    dynamic = list(dynamics.forward_dynamics.parameters())
    by_loss = torch.autograd.grad(prediction.next_z.sum(), factorizer, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in by_loss)
    by_bridge = torch.autograd.grad(prediction.bridged_z.sum(), factorizer, retain_graph=True, allow_unused=True)
    assert all(gradient is not None for gradient in by_bridge)
    by_bridge = torch.autograd.grad(prediction.bridged_z.sum(), dynamic, allow_unused=True)
    assert all(gradient is None for gradient in by_bridge)


@pytest.mark.parametrize("factors", [1, FACTORS])
@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_without_slots_nothing_looks_ahead_and_every_action_is_of_the_whole_frame(latent: str, factors: int) -> None:
    dynamics = patches(latent=latent, factors=factors)
    z = source(2, FRAMES, TOKENIZER.patches, CHANNELS)
    prediction, rolled = dynamics(z, rollout_steps=2)
    assert prediction.masks is None
    up_to_next = t_in <= t_out + 1
    found = strengths(prediction.actions.sample, z)
    assert_depends_exactly_on(up_to_next[:-1, :1, :, :1].expand_as(found), found)
    by_frame = strengths(prediction.next_z, z).amax(dim=-1, keepdim=True)
    assert_depends_exactly_on(up_to_next[:-1, :1, :, :1].expand_as(by_frame), by_frame)
    by_frame = strengths(rolled, z).amax(dim=-1, keepdim=True)
    wanted = (t_in <= t_out + FRAMES - 2)[:2, :1, :, :1]
    assert_depends_exactly_on(wanted.expand_as(by_frame), by_frame)


def test_without_slots_each_patch_hears_every_action_so_far_and_none_to_come() -> None:
    dynamics = patches(factors=FACTORS)
    z = torch.randn(2, FRAMES, TOKENIZER.patches, CHANNELS, dtype=torch.float64)
    actions = source(2, FRAMES, FACTORS, ACTION)
    found = strengths(dynamics.forward_dynamics(z, actions), actions)
    assert_depends_exactly_on((t_in <= t_out)[:, :1, :, :1].expand_as(found), found)


def test_true_actions_tell_their_kinds_apart() -> None:
    sizes = {"state": "patches", "latent": "true", "factors": 1, "true_actions": (2, 1, 5)}
    dynamics = shaken(PatchDynamics(config(**sizes), TOKENIZER))
    z = torch.randn(2, FRAMES, TOKENIZER.patches, CHANNELS, dtype=torch.float64)
    given = torch.randint(5, (2, FRAMES, 2, 1)).float()
    before, _ = dynamics(z, true_actions=given)
    for entity in range(2):
        other = given.clone()
        other[:, 1, entity] = (other[:, 1, entity] + 1) % 5
        after, _ = dynamics(z, true_actions=other)
        assert torch.equal(before.next_z[:, 0], after.next_z[:, 0])
        assert not torch.allclose(before.next_z[:, 1], after.next_z[:, 1])
    last = given.clone()
    last[:, -1] = (last[:, -1] + 1) % 5  # leads past the clip
    assert torch.equal(before.next_z, dynamics(z, true_actions=last)[0].next_z)


# --- the learned prior ---


@pytest.mark.parametrize("state", ["slots", "patches"])
@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_the_learned_prior_sees_no_frame_after_the_action_and_trains_nothing_else(latent: str, state: str) -> None:
    model = shaken(Flam(TOKENIZER, config(latent=latent, state=state, codebook=4)))
    dynamics = model.dynamics
    z = source(2, FRAMES, TOKENIZER.patches, CHANNELS)
    prediction, _ = dynamics(z)
    assert prediction.prior_nll.shape == prediction.actions.penalty.shape
    others = [p for name, p in dynamics.named_parameters() if not name.startswith("prior.")]
    gradients = torch.autograd.grad(prediction.prior_nll.sum(), [z, *others], retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    tokens = source(2, FRAMES, *dynamics.state(z)[0].shape[2:])
    raw = dynamics.prior._raw(tokens)
    by_frame = strengths(raw, tokens).amax(dim=-1, keepdim=True)
    assert_depends_exactly_on((t_in <= t_out)[:, :1, :, :1].expand_as(by_frame), by_frame)


def test_the_gaussian_priors_density_integrates_to_one() -> None:
    model = shaken(Flam(TOKENIZER, config(factors=1, latent_width=1, prior_components=3)))
    prior = model.dynamics.prior
    tokens = torch.randn(1, 1, 1, WIDTH, dtype=torch.float64)
    grid = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    prediction, _ = model.dynamics(torch.randn(1, 2, TOKENIZER.patches, CHANNELS, dtype=torch.float64))
    at = replace(prediction.actions, sample=grid[:, None, None, None])
    density = (-prior(tokens.expand(len(grid), -1, -1, -1), at)).exp()
    assert torch.trapezoid(density.flatten(), grid).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_imagined_futures_follow_the_seed_and_can_be_replayed(latent: str) -> None:
    model = shaken(Flam(TOKENIZER, config(latent=latent, codebook=4))).eval()
    frames = torch.randint(0, 256, (3, 2, 16, 16, 3)).to(torch.uint8)
    first, actions = model.imagine(frames, 4, torch.Generator().manual_seed(1))
    again, _ = model.imagine(frames, 4, torch.Generator().manual_seed(1))
    other, _ = model.imagine(frames, 4, torch.Generator().manual_seed(2))
    assert first.shape == (3, 4, 16, 16, 3)
    assert actions.shape == (3, 5, FACTORS, ACTION)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.allclose(model.rollout(frames, actions), first)


@pytest.mark.parametrize("state", ["slots", "patches"])
@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_imagined_actions_are_those_that_the_model_infers_from_what_it_drew(latent: str, state: str) -> None:
    model = shaken(Flam(TOKENIZER, config(latent=latent, state=state, codebook=4))).eval()
    frames = torch.randint(0, 256, (3, 2, 16, 16, 3)).to(torch.uint8)
    slots = model.slots(model.encode(frames))[0]
    known, drawn = model.infer_actions(slots), model.sample_next_actions(slots, torch.Generator().manual_seed(1))
    _, plain = model.imagine(frames, 1, torch.Generator().manual_seed(1), "slots")
    assert torch.allclose(plain, torch.cat([known, drawn[:, None]], dim=1), atol=1e-5)  # nothing is drawn there
    for _ in range(2):
        film = model.rollout(frames, torch.cat([known, drawn[:, None]], dim=1), "frames")
        seen = torch.cat([frames, (film * 255).round().to(torch.uint8)], dim=1)
        drawn = model.infer_actions(model.slots(model.encode(seen))[0])[:, -1]
    _, settled = model.imagine(frames, 1, torch.Generator().manual_seed(1), "frames")
    assert torch.allclose(settled, torch.cat([known, drawn[:, None]], dim=1), atol=1e-5)
    assert latent == "vq" or not torch.allclose(settled, plain, atol=1e-3)  # codes may have been right already


# --- variants ---


def small() -> Config:
    """A recipe with all that a variant must undo, small enough to train here."""
    loss = LossConfig(bridge=1.0, slot_prediction=0.1)
    model = replace(CONFIG.model, slot_start="motion", motion_readout=True, width=32, heads=4)
    return replace(CONFIG, model=model, loss=loss, slot_hold=0.3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_by_the_same_loop_and_every_weight_gets_a_gradient(name: str) -> None:
    settings = apply_variant(small(), name, GRID_ACTIONS)
    assert settings.variant == name
    assert settings.model.latent_width == small().model.latent_width
    assert (settings.tokenizer, settings.flam_stage) == (small().tokenizer, small().flam_stage)
    assert apply_variant(settings, name, GRID_ACTIONS) == settings
    trainer = Trainer(settings, CPU)
    frames = torch.randint(0, 256, (2, 4, 16, 16, 3)).to(torch.uint8)
    actions = torch.randint(5, (2, 4, 3, 1)).float()
    while trainer.step < trainer.total_steps:
        meters = trainer.train_step(frames if trainer.stage else frames[:, :2], ["a", "b"], actions)
    assert torch.isfinite(meters["flam/loss"])
    idle = [n for n, p in trainer.model.dynamics.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    slots, _ = trainer.model.slots(trainer.model.encode(frames))
    inferred = trainer.model.infer_actions(slots, actions)
    assert inferred.shape == (2, 3, settings.model.factors, settings.model.action_dim)
    assert trainer.model.rollout(frames[:, :1], inferred, "frames").shape == (2, 3, 16, 16, 3)


@pytest.mark.parametrize("name", ["monolithic-gaussian", "monolithic-vq", "grouped", TRUE_ACTIONS])
@pytest.mark.parametrize("recipe", ["tiny", "multigrid"])
def test_rivals_without_slots_weigh_what_flam_weighs(recipe: str, name: str) -> None:
    flam = get_recipe(recipe)
    rival = apply_variant(flam, name, GRID_ACTIONS)
    target = dynamics_weights(flam.model, flam.tokenizer)
    assert dynamics_weights(rival.model, rival.tokenizer) == pytest.approx(target, rel=0.05)


def test_an_unknown_variant_is_named_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="grouped"):
        apply_variant(small(), "grupped")
    with pytest.raises(SettingsError, match="true actions"):
        apply_variant(small(), TRUE_ACTIONS)


@pytest.mark.parametrize(
    "changes",
    [
        {"latent": "true"},
        {"true_actions": (3, 1, 5)},
        {"latent": "true", "true_actions": (3, 1, 5)},
        {"latent": "none", "state": "patches"},
        {"state": "patches", "coupling": "global"},
        {"state": "patches", "motion_readout": True},
        {"latent": "none", "motion_readout": True},
        {"state": "patches", "slot_place": True},
        {"codebook_decay": 1.0},
        {"codebook_revival": 1.0},
        {"prior_components": 0},
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ModelConfig(**changes)


# --- pruning ---


def test_a_pruned_model_keeps_the_chosen_slots() -> None:
    model = shaken(Flam(TOKENIZER, config()))
    assert isinstance(model.dynamics, Dynamics)
    smaller = model.pruned([2, 0])
    assert smaller.factors == 2
    assert isinstance(smaller.dynamics, Dynamics)
    initial: Tensor = smaller.dynamics.factorizer.initial
    assert torch.equal(initial, model.dynamics.factorizer.initial[[2, 0]])
    frames = torch.randint(0, 256, (2, 3, 16, 16, 3)).to(torch.uint8)
    actions = smaller.infer_actions(smaller.slots(smaller.encode(frames))[0])
    assert smaller.rollout(frames[:, :1], actions).shape == (2, 2, 16, 16, 3)
    with pytest.raises(SettingsError, match="without slots"):
        Flam(TOKENIZER, config(state="patches")).pruned([0])
