"""The model's parts: attention, slots, latent actions and rollouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.errors import SettingsError
from flam_core.model import Dynamics, Flam
from flam_core.model.attention import Attention, PositionCode, RelativeTime
from flam_core.model.factorizer import Factorizer
from flam_core.model.latent_action import GaussianLatent, VQLatent

TOKENIZER = TokenizerConfig(frame_size=24, unshuffle=4, channels=(8,), feature_dim=6)
MODEL = ModelConfig(factors=3, width=16, heads=2, blocks=2, iterations=2, latent_width=12, codebook=5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def model(tokenizer: TokenizerConfig = TOKENIZER, **changes: Any) -> Flam:
    """In double precision, with standardised features, and with codes that small differences of features change."""
    flam = Flam(tokenizer, replace(MODEL, **changes)).double().eval()
    with torch.no_grad():
        flam.tokenizer.to_codes.weight *= 50
    flam.tokenizer.standardise(flam.tokenizer.moments(pictures(16)))
    return flam


def pictures(*shape: int, size: int = 24) -> Tensor:
    return torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, TOKENIZER.patches, TOKENIZER.feature_dim, dtype=torch.float64)


# Attention


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2))
def test_relative_time_lets_a_query_see_the_window_up_to_its_frame(
    queries: int, keys: int, window: int, offset: int
) -> None:
    bias = RelativeTime(heads=2, window=window)(queries, keys, offset)
    assert bias.shape == (2, queries, keys)
    for query in range(queries):
        for key in range(keys):
            seen = 0 <= query + offset - key < window
            assert torch.isfinite(bias[:, query, key]).all() == seen


def test_relative_time_depends_on_the_distance_alone() -> None:
    bias = RelativeTime(heads=3, window=4)(9, 9)
    assert torch.equal(bias[:, 1:, 1:], bias[:, :-1, :-1])
    assert torch.equal(RelativeTime(heads=3, window=4)(8, 9, offset=1), bias[:, 1:])


def test_attention_does_not_depend_on_the_size_of_queries_and_keys() -> None:
    attention = Attention(16, 4).double()
    queries, context = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    small = attention(queries, context)
    assert torch.allclose(attention(queries * 1000, context), small, atol=1e-8)
    # Keys are normalised, values are not: a context 1000 times larger gives values 1000 times larger, no more.
    bias = attention.out.bias
    assert torch.allclose(attention(queries, context * 1000) - bias, (small - bias) * 1000, atol=1e-6)


def test_sharpness_is_the_initial_spread_of_the_logits() -> None:
    queries, context = torch.randn(64, 64, 64), torch.randn(64, 64, 64)
    for sharpness in (0.5, 3.0):
        attention = Attention(64, 2, sharpness)
        q, k = attention.to_query(queries), attention.to_key_value(context)[..., :64]
        q, k = (x.unflatten(-1, (2, 32)).transpose(1, 2) for x in (q, k))
        q, k = (x / x.pow(2).mean(dim=-1, keepdim=True).sqrt() for x in (q, k))
        logits = q * attention.log_scale.exp() @ k.transpose(-1, -2) / 32**0.5
        assert logits.std().item() == pytest.approx(sharpness, rel=0.1)


def test_a_bias_of_minus_infinity_forbids() -> None:
    attention = Attention(16, 2).double()
    queries, context = torch.randn(3, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    bias = torch.zeros(2, 3, 5, dtype=torch.float64)
    bias[:, :, 3:] = float("-inf")
    assert torch.allclose(attention(queries, context, bias), attention(queries, context[:3]))


@pytest.mark.parametrize("grid", [1, 2, 3, 8, 14])
def test_every_patch_has_a_code_of_its_own_of_unit_scale(grid: int) -> None:
    codes = PositionCode(grid, 32)()
    assert codes.shape == (grid**2, 32)
    assert codes.std(dim=-1, correction=0).mean().item() == pytest.approx(1, abs=0.05)
    distances = torch.cdist(codes, codes) + torch.eye(grid**2) * 1e9
    assert distances.min() > 1e-3


# Slots


@pytest.mark.parametrize("focus", [1.0, 2.0])
@pytest.mark.parametrize("competition", ["slots", "dual"])
def test_masks_share_out_every_patch(competition: Any, focus: float) -> None:
    config = replace(MODEL, slot_competition=competition, slot_focus=focus, slot_sharpness=8.0)
    slots, masks = Factorizer(config, TOKENIZER.feature_dim, TOKENIZER.grid).double()(features(2, 3))
    assert slots.shape == (2, 3, MODEL.factors, MODEL.width)
    assert masks.shape == (2, 3, MODEL.factors, TOKENIZER.patches)
    assert torch.allclose(masks.sum(dim=-2).double(), torch.ones(2, 3, TOKENIZER.patches, dtype=torch.float64))
    assert masks.min() >= 0
    assert masks.std(dim=-2).max() > 0.01


@pytest.mark.parametrize("focus", [1.0, 4.0])
@pytest.mark.parametrize("competition", ["slots", "dual"])
def test_slots_stay_finite_however_sharp_the_competition(competition: Any, focus: float) -> None:
    config = replace(MODEL, slot_competition=competition, slot_focus=focus, slot_sharpness=1000.0)
    factorizer = Factorizer(config, TOKENIZER.feature_dim, TOKENIZER.grid)
    slots, _ = factorizer(features(2, 3).float())
    slots.pow(2).sum().backward()
    assert torch.isfinite(slots).all()
    assert all(torch.isfinite(weight.grad).all() for weight in factorizer.parameters() if weight.grad is not None)


def test_time_is_relative() -> None:
    config = replace(MODEL, temporal_window=3)
    factorizer = Factorizer(config, TOKENIZER.feature_dim, TOKENIZER.grid).double()
    z = features(2, 12)
    reach = config.iterations * (config.temporal_window - 1)
    assert torch.allclose(factorizer(z)[0][:, reach + 1 :], factorizer(z[:, 1:])[0][:, reach:], atol=1e-10)


# Latent actions


def test_gaussian_penalty_is_the_kl_to_a_standard_normal() -> None:
    latent = GaussianLatent(MODEL)
    torch.nn.init.normal_(latent.head.weight, std=0.3)
    h = torch.randn(2, 4, 3, MODEL.width)
    mean, log_variance = latent.head(h).chunk(2, dim=-1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    actions = latent(h)
    assert torch.allclose(actions.mean, mean)
    assert torch.allclose(actions.penalty, kl_divergence(posterior, Normal(0.0, 1.0)).sum(dim=-1), atol=1e-5)
    assert actions.codes is None


def test_gaussian_samples_have_the_posteriors_moments() -> None:
    latent = GaussianLatent(replace(MODEL, initial_log_variance=-1.0))
    h = torch.randn(1, 1, 1, MODEL.width)
    mean, log_variance = latent.head(h)[0, 0, 0].chunk(2, dim=-1)
    samples = latent(h.expand(20_000, 1, 1, -1)).sample[:, 0, 0]
    assert torch.allclose(samples.mean(dim=0), mean, atol=0.03)
    assert torch.allclose(samples.std(dim=0), (0.5 * log_variance).exp(), atol=0.03)


def test_the_gain_of_the_log_variance_is_of_what_is_learnt() -> None:
    """At the start it changes nothing; then a step of Adam moves the log-variance so many times as far."""
    h = torch.randn(2, 3, MODEL.factors, MODEL.width, generator=torch.Generator().manual_seed(0))
    moved = []
    for gain in (1.0, 20.0):
        torch.manual_seed(0)
        latent = GaussianLatent(replace(MODEL, log_variance_gain=gain))
        optimiser = torch.optim.Adam(latent.parameters(), lr=1e-3)
        first = latent(h).penalty
        first.mean().backward()
        optimiser.step()
        moved.append((first.detach(), float((first - latent(h).penalty).detach().mean())))
    torch.testing.assert_close(moved[0][0], moved[1][0])
    assert moved[1][1] > 5 * moved[0][1] > 0


@pytest.mark.parametrize("gain", [0.0, -1.0])
def test_a_gain_that_is_none_is_refused(gain: float) -> None:
    with pytest.raises(SettingsError, match="log_variance_gain"):
        replace(MODEL, log_variance_gain=gain)


def test_the_posterior_starts_at_the_configured_noise() -> None:
    latent = GaussianLatent(replace(MODEL, initial_log_variance=-5.0))
    assert (latent.head.bias[MODEL.action_dim :] == -5).all()


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_gaussian_latents_survive_extreme_inputs(size: float) -> None:
    actions = GaussianLatent(MODEL)(torch.full((1, 1, 1, MODEL.width), size))
    assert torch.isfinite(actions.sample).all()
    assert torch.isfinite(actions.penalty).all()


def test_vq_samples_are_the_nearest_codes() -> None:
    latent = VQLatent(MODEL)
    h = torch.randn(4, 3, 3, MODEL.width)
    x = torch.nn.functional.normalize(latent.head(h), dim=-1)
    book = torch.nn.functional.normalize(latent.codebook.weight, dim=-1)
    nearest = torch.cdist(x, book.expand(4, 3, *book.shape)).argmin(dim=-1)
    actions = latent(h)
    assert torch.equal(actions.codes, nearest)
    assert torch.allclose(actions.mean, book[nearest])
    assert torch.allclose(actions.sample, actions.mean, atol=1e-6)
    distance = (x - book[nearest]).pow(2).sum(dim=-1)
    assert torch.allclose(actions.penalty, (1 + MODEL.commitment) * distance, atol=1e-5)


def test_vq_samples_train_the_head_and_the_penalty_trains_the_codebook_too() -> None:
    latent = VQLatent(MODEL)
    actions = latent(torch.randn(4, 3, 3, MODEL.width))
    head, codebook = latent.head.weight, latent.codebook.weight
    through_sample = torch.autograd.grad(
        actions.sample[..., 0].sum(), (head, codebook), retain_graph=True, materialize_grads=True
    )
    assert through_sample[0].norm() > 1e-4
    assert through_sample[1].norm() == 0
    assert all(gradient.norm() > 1e-4 for gradient in torch.autograd.grad(actions.penalty.sum(), (head, codebook)))


def test_the_vq_prior_draws_every_code_and_nothing_else() -> None:
    latent = VQLatent(MODEL)
    drawn = latent.prior((400,), torch.Generator().manual_seed(1)).unique(dim=0)
    book = torch.nn.functional.normalize(latent.codebook.weight, dim=-1)
    assert len(drawn) == MODEL.codebook
    assert torch.cdist(drawn, book).amin(dim=-1).max() < 1e-5


def test_the_gaussian_prior_is_standard_normal() -> None:
    drawn = GaussianLatent(MODEL).prior((5000,))
    assert drawn.shape == (5000, MODEL.action_dim)
    assert drawn.mean().abs() < 0.05
    assert drawn.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_prior_samples_follow_the_generator(latent: Any) -> None:
    flam = model(latent=latent)
    draws = [flam.sample_actions((2, 5, 3), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (2, 5, 3, MODEL.action_dim)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# Prediction and rollout


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_a_trained_rollout_is_a_rollout_of_the_inferred_actions_from_the_frame_before(latent: Any) -> None:
    dynamics = Dynamics(replace(MODEL, latent=latent), TOKENIZER).double()
    z, steps = features(2, 6), 3
    prediction, rolled = dynamics(z, rollout_steps=steps)
    start = 6 - steps
    again = dynamics.rollout(z[:, start - 1], prediction.slots[:, :start], prediction.actions.sample)
    assert torch.allclose(rolled, again, atol=1e-12)
    assert torch.allclose(rolled[:, 0], prediction.next_z[:, start - 1], atol=1e-10)
    assert not torch.allclose(rolled[:, 1], prediction.next_z[:, start], atol=1e-3)


def test_one_step_of_rollout_is_the_teacher_forced_prediction() -> None:
    dynamics = Dynamics(MODEL, TOKENIZER).double()
    prediction, rolled = dynamics(features(2, 5), rollout_steps=1)
    assert rolled.shape[1] == 1
    assert torch.allclose(rolled[:, 0], prediction.next_z[:, -1], atol=1e-10)


def test_the_bridge_is_what_perfect_slots_would_predict() -> None:
    dynamics = Dynamics(MODEL, TOKENIZER).double()
    z = features(2, 4)
    prediction, none = dynamics(z, bridge=True)
    assert none is None
    assert torch.equal(prediction.bridged_z, dynamics.aggregator(z[:, :-1], prediction.slots[:, 1:]))
    assert dynamics(z)[0].bridged_z is None


@pytest.mark.parametrize("context", [1, 3])
def test_a_rollout_in_slot_space_is_one_step_after_another(context: int) -> None:
    flam, steps = model(temporal_window=4), 9
    frames, actions = pictures(2, context), torch.randn(2, context - 1 + steps, 3, 4, dtype=torch.float64)
    z = flam.encode(frames)
    slots, z = flam.slots(z)[0], z[:, -1:]
    expected = []
    with torch.no_grad():
        for step in range(steps):
            first = max(0, context + step - 4)
            following = flam.dynamics.forward_dynamics(slots[:, first:], actions[:, first : context + step])[:, -1:]
            z, slots = flam.dynamics.aggregator(z, following), torch.cat([slots, following], dim=1)
            expected.append(flam.decode(z))
    rolled = flam.rollout(frames, actions)
    assert rolled.shape == (2, steps, 24, 24, 3)
    assert torch.allclose(rolled, torch.cat(expected, dim=1), atol=1e-8)


@pytest.mark.parametrize("context", [1, 3])
def test_a_rollout_by_frames_reads_its_own_pictures(context: int) -> None:
    flam, steps = model(temporal_window=4), 6
    with torch.no_grad():
        flam.dynamics.aggregator.out[1].weight.mul_(30)  # so that what an action does outgrows a code's step
    frames, actions = pictures(2, context), 10 * torch.randn(2, context - 1 + steps, 3, 4, dtype=torch.float64)
    rolled = flam.rollout(frames, actions, feedback="frames")
    assert rolled.shape == (2, steps, 24, 24, 3)
    others = flam.rollout(frames, actions.flip(1), feedback="frames")
    assert not torch.allclose(rolled[:, -1], others[:, -1], atol=1e-4)  # each action shows, despite quantisation
    seen = frames
    for step in range(steps):
        known = slice(max(0, context + step - 4), context + step)  # what the window holds
        one = flam.rollout(seen[:, known], actions[:, known], feedback="frames")
        assert one.shape[1] == 1
        assert torch.allclose(rolled[:, step : step + 1], one, atol=1e-8)
        seen = torch.cat([seen, (one * 255).round().to(torch.uint8)], dim=1)


@pytest.mark.parametrize("feedback", ["slots", "frames"])
def test_rollouts_may_be_far_longer_than_the_window(feedback: Any) -> None:
    flam = model(temporal_window=3)
    actions = torch.randn(1, 40, 3, 4, dtype=torch.float64)
    frames = pictures(1, 1)
    long, short = flam.rollout(frames, actions, feedback), flam.rollout(frames, actions[:, :5], feedback)
    assert torch.isfinite(long).all()
    assert 0 <= long.min() <= long.max() <= 1
    assert torch.allclose(long[:, :5], short, atol=1e-10)


def test_both_kinds_of_feedback_agree_on_the_first_step_and_then_part() -> None:
    flam, frames = model(), pictures(2, 2)
    actions = 3 * torch.randn(2, 6, 3, 4, dtype=torch.float64)
    by_slots, by_frames = flam.rollout(frames, actions), flam.rollout(frames, actions, feedback="frames")
    assert torch.allclose(by_slots[:, 0], by_frames[:, 0], atol=1e-10)
    assert not torch.allclose(by_slots[:, 1:], by_frames[:, 1:], atol=1e-4)


def test_inferred_actions_and_evaluation_are_without_noise() -> None:
    flam = model()
    slots = flam.slots(flam.encode(pictures(2, 4)))[0]
    assert torch.equal(flam.infer_actions(slots), flam.infer_actions(slots))
    assert flam.infer_actions(slots).shape == (2, 3, 3, 4)
    assert flam.factors == 3


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
@pytest.mark.parametrize("query", ["patch", "place"])
def test_every_weight_of_the_dynamics_gets_a_gradient(latent: Any, query: Any) -> None:
    # Distributed training waits for the gradient of every weight.
    dynamics = Dynamics(replace(MODEL, latent=latent, aggregator_query=query), TOKENIZER).double()
    prediction, _ = dynamics(features(2, 4))
    assert prediction.prior_nll is not None
    (prediction.next_z.pow(2).mean() + prediction.actions.penalty.mean() + prediction.prior_nll.mean()).backward()
    assert [name for name, weight in dynamics.named_parameters() if weight.grad is None] == []
