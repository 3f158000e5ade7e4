"""What each part may see, proved by gradients: the factored structure that makes FLAM what it is.

Every output (frame t, slot i) is projected at random and differentiated by every input (frame t', slot j). Where the
method forbids a dependency the gradient must be exactly zero; where it wants one it must be clearly there. Weights are
perturbed, so that no zero is an accident of the initialisation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.model import Dynamics
from flam_core.model.dynamics import Aggregator, ForwardDynamics, InverseDynamics
from flam_core.model.factorizer import Factorizer

FRAMES, FACTORS, WIDTH, ACTION, CHANNELS = 5, 3, 24, 4, 6
TOKENIZER = TokenizerConfig(frame_size=16, unshuffle=4, channels=(8,), feature_dim=CHANNELS)
SIZES: dict[str, Any] = {
    "factors": FACTORS,
    "width": WIDTH,
    "heads": 4,
    "blocks": 2,
    "iterations": 2,
    "latent_width": FACTORS * ACTION,
    "initial_log_variance": -1.0,
}
LATENTS = ("gaussian", "vq")
COMPETITIONS = ("slots", "dual")
WINDOWS = (2, 16)

# Broadcast over [t, i, t', j]: frame and slot of the output, frame and slot of the input.
t_out, slot_out = torch.arange(FRAMES)[:, None, None, None], torch.arange(FACTORS)[None, :, None, None]
t_in, slot_in = torch.arange(FRAMES)[None, None, :, None], torch.arange(FACTORS)[None, None, None, :]
same_slot = slot_out == slot_in


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **changes})


def shaken(module: torch.nn.Module) -> Any:
    """In double precision, with every weight moved off its initial value."""
    module.double()
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return module


def source(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def strengths(output: Tensor, by: Tensor) -> Tensor:
    """Gradient norms [T, N, T', N'] of each entry of `output` [B, T, N, C] by each entry of `by` [B, T', N', C']."""
    found = torch.zeros(*output.shape[1:3], *by.shape[1:3], dtype=torch.float64)
    for t in range(output.shape[1]):
        for i in range(output.shape[2]):
            projected = (output[:, t, i] * torch.randn_like(output[:, t, i])).sum()
            (gradient,) = torch.autograd.grad(projected, by, retain_graph=True, materialize_grads=True)
            found[t, i] = gradient.norm(dim=-1).amax(dim=0)
    return found


def assert_depends_exactly_on(wanted: Tensor, found: Tensor) -> None:
    wanted = wanted.expand_as(found)
    leaks = (~wanted & (found != 0)).nonzero().tolist()
    assert not leaks, f"[t, i, t', j] that must not matter but do: {leaks[:5]}"
    missing = (wanted & (found < 1e-7)).nonzero().tolist()
    assert not missing, f"[t, i, t', j] that must matter but do not: {missing[:5]}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("place", [False, True], ids=["", "place"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("latent", LATENTS)
def test_an_action_depends_on_current_slots_and_on_its_own_track_up_to_the_next_frame(
    latent: str, window: int, place: bool
) -> None:
    inverse = shaken(InverseDynamics(config(latent=latent, temporal_window=window, slot_place=place)))
    slots = source(2, FRAMES, FACTORS, WIDTH)
    actions = inverse(slots)
    own_track = same_slot & (t_in <= t_out + 1) & (t_in > t_out + 1 - window)
    wanted = ((t_in == t_out) | own_track)[:-1]
    assert_depends_exactly_on(wanted, strengths(actions.sample, slots))
    assert_depends_exactly_on(wanted, strengths(actions.penalty[..., None], slots))
    if latent == "gaussian":
        assert_depends_exactly_on(wanted, strengths(actions.mean, slots))


@pytest.mark.parametrize("place", [False, True], ids=["", "place"])
@pytest.mark.parametrize("latent", LATENTS)
def test_another_slots_next_value_leaves_inferred_actions_bit_equal(latent: str, place: bool) -> None:
    # Gradients do not see what rounding to a code hides; an intervention does.
    inverse = shaken(InverseDynamics(config(latent=latent, codebook=64, slot_place=place)))
    slots = torch.randn(8, 2, FACTORS, WIDTH, dtype=torch.float64)
    before = inverse(slots)
    for changed in range(FACTORS):
        moved = slots.clone()
        moved[:, 1, changed] = torch.randn(8, WIDTH, dtype=torch.float64)
        after = inverse(moved)
        others = [i for i in range(FACTORS) if i != changed]
        assert torch.equal(before.mean[:, :, others], after.mean[:, :, others])
        assert torch.equal(before.penalty[:, :, others], after.penalty[:, :, others])
        assert not torch.equal(before.mean[:, :, changed], after.mean[:, :, changed])


@pytest.mark.parametrize("window", WINDOWS)
def test_a_next_slot_depends_on_all_slots_so_far_and_on_its_own_actions_only(window: int) -> None:
    settings = config(temporal_window=window)
    forward = shaken(ForwardDynamics(settings))
    slots, actions = source(2, FRAMES, FACTORS, WIDTH), source(2, FRAMES, FACTORS, ACTION)
    next_slots = forward(slots, actions)
    past = (t_in <= t_out) & (t_in >= t_out - settings.blocks * (window - 1))
    assert_depends_exactly_on(past, strengths(next_slots, slots))
    assert_depends_exactly_on(past & same_slot, strengths(next_slots, actions))


@pytest.mark.parametrize("latent", LATENTS)
def test_inverse_and_forward_dynamics_together_see_only_the_own_next_slot(latent: str) -> None:
    settings = config(latent=latent)
    inverse, forward = shaken(InverseDynamics(settings)), shaken(ForwardDynamics(settings))
    slots = source(2, FRAMES, FACTORS, WIDTH)
    next_slots = forward(slots[:, :-1], inverse(slots).sample)
    wanted = (t_in <= t_out) | (same_slot & (t_in == t_out + 1))
    assert_depends_exactly_on(wanted[:-1], strengths(next_slots, slots))


@pytest.mark.parametrize("focus", [1.0, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("competition", COMPETITIONS)
def test_slots_depend_on_frames_so_far(competition: str, window: int, focus: float) -> None:
    settings = config(slot_competition=competition, temporal_window=window, slot_focus=focus)
    factorizer = shaken(Factorizer(settings, CHANNELS, TOKENIZER.grid))
    z = source(2, FRAMES, TOKENIZER.patches, CHANNELS)
    slots, masks = factorizer(z)
    reach = window - 1
    past = (t_in <= t_out) & (t_in >= t_out - settings.iterations * reach)
    assert_depends_exactly_on(past[..., :1], strengths(slots, z))
    before_last = (t_in <= t_out) & (t_in >= t_out - (settings.iterations - 1) * reach)
    assert_depends_exactly_on(before_last[..., :1], strengths(masks, z))


@pytest.mark.parametrize("query", ["patch", "place"])
def test_the_aggregator_sees_one_frame_and_its_predicted_slots(query: str) -> None:
    settings = config(aggregator_query=query)
    position = Factorizer(settings, CHANNELS, TOKENIZER.grid).position
    aggregator = shaken(Aggregator(settings, CHANNELS, position))
    z, slots = source(2, FRAMES, TOKENIZER.patches, CHANNELS), source(2, FRAMES, FACTORS, WIDTH)
    next_z = aggregator(z, slots)
    assert_depends_exactly_on(t_in == t_out, strengths(next_z, slots))
    by_frame = strengths(next_z, z).amax(dim=-1, keepdim=True)
    assert_depends_exactly_on((t_in == t_out)[..., :1], by_frame)


def test_a_patch_that_asks_by_its_place_asks_alike_whatever_it_shows() -> None:
    asked: dict[str, list[torch.Tensor]] = {"patch": [], "place": []}
    for query, queries in asked.items():
        settings = config(aggregator_query=query)
        aggregator = shaken(Aggregator(settings, CHANNELS, Factorizer(settings, CHANNELS, TOKENIZER.grid).position))
        for attention in aggregator.attentions:
            attention.register_forward_pre_hook(lambda _, given, into=queries: into.append(given[0]))
        slots = source(1, FRAMES, FACTORS, WIDTH)
        for _ in range(2):
            aggregator(torch.randn(1, FRAMES, TOKENIZER.patches, CHANNELS, dtype=torch.float64), slots)
        blocks = len(aggregator.attentions)
        same = [torch.equal(one, other) for one, other in zip(queries[:blocks], queries[blocks:], strict=True)]
        assert same == [query == "place"] * blocks


@pytest.mark.parametrize("competition", COMPETITIONS)
@pytest.mark.parametrize("latent", LATENTS)
def test_a_prediction_sees_no_frame_after_the_one_it_predicts(latent: str, competition: str) -> None:
    steps = 3
    dynamics = shaken(Dynamics(config(latent=latent, slot_competition=competition), TOKENIZER))
    z = source(2, FRAMES, TOKENIZER.patches, CHANNELS)
    prediction, rolled = dynamics(z, rollout_steps=steps, bridge=True)
    up_to_target = (t_in <= t_out + 1)[..., :1]
    for predicted in (prediction.next_z, prediction.next_slots, prediction.actions.sample, prediction.bridged_z):
        by_frame = strengths(predicted, z).amax(dim=-1, keepdim=True)
        assert_depends_exactly_on(up_to_target[:-1], by_frame)
    by_frame = strengths(rolled, z).amax(dim=-1, keepdim=True)
    assert_depends_exactly_on((t_in <= t_out + FRAMES - steps)[:steps, ..., :1], by_frame)


@pytest.mark.parametrize("competition", COMPETITIONS)
def test_a_rollout_depends_on_known_frames_and_on_actions_up_to_each_step(competition: str) -> None:
    known = 2
    dynamics = shaken(Dynamics(config(slot_competition=competition), TOKENIZER))
    z, actions = source(2, FRAMES, TOKENIZER.patches, CHANNELS), source(2, FRAMES - 1, FACTORS, ACTION)
    slots = dynamics.factorizer(z)[0]
    rolled = dynamics.rollout(z[:, known - 1], slots[:, :known], actions)
    steps = FRAMES - known
    assert rolled.shape[1] == steps
    by_frame = strengths(rolled, z).amax(dim=-1, keepdim=True)
    assert_depends_exactly_on((t_in < known)[..., :1], by_frame)
    so_far = (t_in <= t_out + known - 1)[:steps, :, :-1]
    assert_depends_exactly_on(so_far, strengths(rolled, actions))


@pytest.mark.parametrize("latent", LATENTS)
def test_clips_of_a_batch_do_not_see_each_other(latent: str) -> None:
    dynamics = shaken(Dynamics(config(latent=latent), TOKENIZER))
    z = source(3, FRAMES, TOKENIZER.patches, CHANNELS)
    prediction, rolled = dynamics(z, rollout_steps=2)
    for output in (prediction.next_z, rolled, prediction.actions.penalty, prediction.masks):
        projected = (output[1] * torch.randn_like(output[1])).sum()
        (gradient,) = torch.autograd.grad(projected, z, retain_graph=True)
        assert (gradient[[0, 2]] == 0).all()
        assert gradient[1].norm() > 1e-7
