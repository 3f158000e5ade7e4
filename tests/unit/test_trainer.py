"""Training steps: both stages, what a checkpoint holds, and that a resumed run is the unbroken one."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flam_core.config import Config, LossConfig, ModelConfig, StageConfig, TokenizerConfig
from flam_core.errors import DataError, TrainingFailed
from flam_core.learning.losses import beta_at
from flam_core.learning.schedule import learning_rate
from flam_core.learning.trainer import Trainer
from flam_core.model.latent_action import GaussianLatent
from flam_core.saved_model import weights_to_bytes

STAGE_1, STAGE_2 = 3, 4
CPU = torch.device("cpu")
CONFIG = Config(
    recipe="test",
    tokenizer=TokenizerConfig(frame_size=16, unshuffle=4, channels=(8,), feature_dim=6),
    model=ModelConfig(
        factors=2, width=16, heads=2, blocks=1, iterations=2, temporal_window=3, latent_width=8, codebook=4
    ),
    tokenizer_stage=StageConfig(steps=STAGE_1, batch_clips=2, clip_frames=2, learning_rate=1e-2, warmup=2),
    flam_stage=StageConfig(steps=STAGE_2, batch_clips=2, clip_frames=4, learning_rate=1e-2, warmup=2),
    precision="fp32",
)


def config(**changes: Any) -> Config:
    """CONFIG with the given fields of its loss or model (by name) or of its own changed."""
    model = {k: changes.pop(k) for k in list(changes) if k in ModelConfig.__dataclass_fields__}
    loss = {k: changes.pop(k) for k in list(changes) if k in LossConfig.__dataclass_fields__}
    return replace(CONFIG, model=replace(CONFIG.model, **model), loss=replace(CONFIG.loss, **loss), **changes)


def batch(trainer: Trainer) -> tuple[Tensor, list[str]]:
    """The batch of the trainer's next step: random pictures, a function of the step alone."""
    stage = trainer.config.tokenizer_stage if trainer.stage == 0 else trainer.config.flam_stage
    generator = torch.Generator().manual_seed(trainer.step)
    frames = torch.randint(0, 256, (stage.batch_clips, stage.clip_frames, 16, 16, 3), generator=generator)
    return frames.to(torch.uint8), [f"{trainer.step}.{clip}" for clip in range(stage.batch_clips)]


def run(trainer: Trainer, until: int) -> list[dict[str, Tensor]]:
    return [trainer.train_step(*batch(trainer)) for _ in range(until - trainer.step)]


def started(settings: Config = CONFIG, until: int = 0) -> Trainer:
    trainer = Trainer(settings, CPU)
    run(trainer, until)
    return trainer


def weights(part: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in part.state_dict().items()}


def changed(before: dict[str, Tensor], part: torch.nn.Module) -> set[str]:
    return {name for name, value in part.state_dict().items() if not torch.equal(before[name], value)}


# The two stages


def test_stage_1_trains_the_tokenizer_alone_and_stage_2_the_dynamics_alone() -> None:
    trainer = Trainer(CONFIG, CPU)
    model = trainer.model
    tokenizer, dynamics = weights(model.tokenizer), weights(model.dynamics)
    assert trainer.stage == 0
    run(trainer, STAGE_1)
    learnt = {name for name, _ in model.tokenizer.named_parameters()}
    assert changed(tokenizer, model.tokenizer) == learnt
    assert changed(dynamics, model.dynamics) == set()
    assert trainer.stage == 1

    tokenizer = weights(model.tokenizer)
    run(trainer, STAGE_1 + 1)
    # The first batch sets the standardisation; nothing else of the tokenizer moves, then or later.
    assert not changed(tokenizer, model.tokenizer) & learnt
    tokenizer = weights(model.tokenizer)
    run(trainer, trainer.total_steps)
    assert changed(tokenizer, model.tokenizer) == set()
    assert not any(weight.requires_grad for weight in model.tokenizer.parameters())
    still = {name for name, _ in model.dynamics.named_parameters()} - changed(dynamics, model.dynamics)
    assert not {name for name in still if "time.bias" not in name}


def test_stage_2_begins_by_standardising_features() -> None:
    trainer = started(until=STAGE_1)
    frames, ids = batch(trainer)
    assert trainer.model.encode(frames).flatten(0, -2).mean(dim=0).abs().max() > 1e-3
    trainer.train_step(frames, ids)
    z = trainer.model.encode(frames).flatten(0, -2)
    assert z.mean(dim=0).abs().max() < 1e-4
    assert z.var(dim=0, correction=0).mean().item() == pytest.approx(1, abs=1e-3)


def test_meters_tell_stage_loss_and_rate() -> None:
    trainer = Trainer(config(rollout_steps=2, bridge=0.5, slot_prediction=0.5), CPU)
    first, second = run(trainer, STAGE_1), run(trainer, trainer.total_steps)
    assert all(set(meters) >= {"tokenizer/loss", "tokenizer/psnr", "tokenizer/grad_norm"} for meters in first)
    names = {"flam/loss", "flam/kl", "flam/rollout", "flam/bridged", "flam/slot_error", "flam/kl_slot_1"}
    assert all(set(meters) >= names for meters in second)
    assert all(math.isfinite(float(value)) for meters in first + second for value in meters.values())
    rates = [learning_rate(CONFIG.flam_stage, step) for step in range(STAGE_2)]
    assert [float(meters["flam/lr"]) for meters in second] == pytest.approx(rates)


@pytest.mark.parametrize("stage", [0, 1])
def test_training_on_one_batch_lowers_its_loss(stage: int) -> None:
    settings = replace(
        config(beta=0.0),
        tokenizer_stage=replace(CONFIG.tokenizer_stage, steps=40 if stage == 0 else 1),
        flam_stage=replace(CONFIG.flam_stage, steps=40),
    )
    trainer = started(settings, until=stage)
    frames, ids = batch(trainer)
    losses = [trainer.train_step(frames, ids)["flam/loss" if stage else "tokenizer/loss"].item() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


def test_bf16_works_in_both_stages() -> None:
    trainer = Trainer(config(precision="bf16", rollout_steps=2, slot_competition="dual"), CPU)
    before = weights(trainer.model)
    meters = run(trainer, trainer.total_steps)
    assert all(math.isfinite(float(value)) for step in meters for value in step.values())
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
    assert changed(before, trainer.model)


# The state


@pytest.mark.parametrize("at", range(1, STAGE_1 + STAGE_2 + 1))
@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_a_restored_run_continues_bit_for_bit(latent: str, at: int) -> None:
    settings = config(latent=latent, rollout_steps=1, slot_competition="dual")
    unbroken = started(settings, until=STAGE_1 + STAGE_2)
    stopped = started(settings, until=at).state()
    torch.manual_seed(999)
    resumed = Trainer(settings, CPU)
    resumed.restore(stopped)
    assert resumed.step == at
    run(resumed, resumed.total_steps)
    assert weights_to_bytes(resumed.model) == weights_to_bytes(unbroken.model)
    assert resumed.consumed_by_all() == unbroken.consumed_by_all()


@pytest.mark.parametrize("kind", ["motion", "slow"])
@pytest.mark.parametrize("at", [STAGE_1, STAGE_1 + 1])
def test_slots_that_started_from_motion_and_were_held_continue_bit_for_bit(at: int, kind: str) -> None:
    settings = config(slot_start=kind, slot_place=kind == "slow", slot_hold=0.5)
    unbroken, state = started(settings, until=STAGE_1 + STAGE_2), started(settings, until=at).state()
    resumed = Trainer(settings, CPU)
    resumed.restore(state)
    run(resumed, resumed.total_steps)
    assert weights_to_bytes(resumed.model) == weights_to_bytes(unbroken.model)


def test_held_slot_starts_move_only_after_the_hold() -> None:
    trainer = started(config(slot_start="motion", slot_hold=0.5), until=STAGE_1 + 1)
    start = trainer.model.dynamics.factorizer.initial.detach().clone()
    run(trainer, STAGE_1 + STAGE_2 // 2)
    assert torch.equal(trainer.model.dynamics.factorizer.initial, start)
    run(trainer, STAGE_1 + STAGE_2 // 2 + 1)
    assert not torch.equal(trainer.model.dynamics.factorizer.initial, start)


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_frozen_latent_actions_stay_while_the_dynamics_learn_on(latent: str) -> None:
    trainer = started(config(latent=latent, latent_freeze=0.5), until=STAGE_1 + STAGE_2 // 2)
    before = copy.deepcopy(trainer.model.dynamics.state_dict())
    run(trainer, STAGE_1 + STAGE_2)
    learnt = {
        name for name, weight in trainer.model.dynamics.named_parameters() if not torch.equal(weight, before[name])
    }
    frozen = {name for name in before if name.startswith(("factorizer.", "inverse."))}
    assert learnt - frozen
    assert bool(learnt & frozen) == (latent == "vq")  # codes have no noise to be rid of


def test_frozen_latent_actions_have_no_noise_and_others_do() -> None:
    trainer = started(config(latent_freeze=0.5), until=STAGE_1 + 1)
    latent = trainer.model.dynamics.latent
    h = torch.randn(2, 3, 2, CONFIG.model.width)
    assert not torch.equal(latent(h).sample, latent(h).mean)
    run(trainer, STAGE_1 + STAGE_2)
    assert torch.equal(latent(h).sample, latent(h).mean)


@pytest.mark.parametrize("at", [STAGE_1 + 1, STAGE_1 + 3])
def test_a_run_with_frozen_latent_actions_continues_bit_for_bit(at: int) -> None:
    settings = config(latent_freeze=0.5)
    unbroken, state = started(settings, until=STAGE_1 + STAGE_2), started(settings, until=at).state()
    resumed = Trainer(settings, CPU)
    resumed.restore(state)
    run(resumed, resumed.total_steps)
    assert weights_to_bytes(resumed.model) == weights_to_bytes(unbroken.model)


@pytest.mark.parametrize("at", [1, STAGE_1, STAGE_1 + 2])
def test_a_restored_state_is_the_state(at: int) -> None:
    state = started(until=at).state()
    resumed = Trainer(CONFIG, CPU)
    resumed.restore(state)
    again = resumed.state()
    assert again is not None
    assert again.model == state.model
    assert {**again.meta, "stage": 0} == {**state.meta, "stage": 0}


def test_what_the_optimiser_remembers_matters_to_the_resumed_run() -> None:
    # The positive control of the tests above: without it, they would pass with any optimiser state.
    unbroken, state = started(until=STAGE_1 + STAGE_2), started(until=STAGE_1 + 2).state()
    resumed = Trainer(CONFIG, CPU)
    resumed.restore(replace(state, meta={**state.meta, "stage": 0}))
    run(resumed, resumed.total_steps)
    assert weights_to_bytes(resumed.model) != weights_to_bytes(unbroken.model)


def test_meta_is_plain_json_and_no_pickled_code_is_read() -> None:
    trainer = started(until=2)
    state = trainer.state()
    assert state is not None
    assert state.meta == {"step": 2, "stage": 0, "consumed": trainer.consumed_by_all()}
    assert json.loads(json.dumps(state.meta)) == state.meta
    with pytest.raises(DataError):
        Trainer(CONFIG, CPU).restore(replace(state, model=b"not weights"))


def test_what_was_consumed_tells_every_clip_its_step_and_its_place() -> None:
    trainer = Trainer(CONFIG, CPU)
    assert int(trainer.consumed_by_all(), 16) == 0
    seen = {trainer.consumed_by_all()}
    for ids in (["a", "b"], ["a", "b"], ["c"]):
        one, other = copy.deepcopy(trainer), copy.deepcopy(trainer)
        frames, _ = batch(trainer)
        trainer.train_step(frames[: len(ids)], ids)
        one.train_step(frames[: len(ids)], ids[::-1])
        other.train_step(frames[: len(ids)], [*ids[:-1], "x"])
        new = {trainer.consumed_by_all(), other.consumed_by_all()}
        new |= {one.consumed_by_all()} if len(ids) > 1 else set()
        assert len(new) == min(3, 1 + len(ids))
        assert not new & seen
        seen |= new


# Randomness


def test_the_seed_decides_everything() -> None:
    runs = [weights_to_bytes(started(config(seed=seed), until=STAGE_1 + 2).model) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_clip_gets_the_noise_of_its_place_in_the_batch_whichever_rank_has_it() -> None:
    """With the one clip of the second rank alone, and in the batch of one rank, what it says is the same."""
    clips, means = 5, torch.zeros(5, 3, 2, 4)
    latent = started(until=STAGE_1).model.dynamics.latent
    assert isinstance(latent, GaussianLatent)
    drawn = []
    for places in (None, range(5), [1, 4], [3]):
        torch.manual_seed(7)
        latent.places = None if places is None else (torch.tensor(list(places)), clips)
        drawn.append(latent._noise(means[: clips if places is None else len(places)]))
    whole, again, some, one = drawn
    assert torch.equal(whole, again)
    assert torch.equal(some, whole[[1, 4]])
    assert torch.equal(one, whole[[3]])


def test_noise_differs_between_steps() -> None:
    trainer = started(until=STAGE_1 + 1)
    state, first = trainer.state(), batch(trainer)
    losses = []
    for step in (trainer.step, trainer.step, trainer.step + 1):
        resumed = Trainer(CONFIG, CPU)
        resumed.restore(replace(state, meta={**state.meta, "step": step}))
        losses.append(resumed.train_step(*first)["flam/loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_what_the_caller_draws_does_not_enter() -> None:
    quiet, noisy = Trainer(CONFIG, CPU), Trainer(CONFIG, CPU)
    run(quiet, STAGE_1 + 2)
    while noisy.step < STAGE_1 + 2:
        torch.rand(3)
        run(noisy, noisy.step + 1)
    assert weights_to_bytes(quiet.model) == weights_to_bytes(noisy.model)


# Failure


@pytest.mark.parametrize("at", [1, STAGE_1 + 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_training_before_it_does_harm(at: int, value: float) -> None:
    trainer = started(until=at)
    part = trainer.model.dynamics.aggregator.out[1] if trainer.stage else trainer.model.tokenizer.decoder.layers[0]
    with torch.no_grad():
        part.bias[0] = value
    before = weights_to_bytes(trainer.model)
    with pytest.raises(TrainingFailed, match=f"gradient is not finite at step {at}") as caught:
        run(trainer, at + 1)
    assert caught.value.fix
    assert trainer.step == at
    assert weights_to_bytes(trainer.model) == before


def test_gradients_are_clipped_to_the_norm() -> None:
    settings = replace(CONFIG, tokenizer_stage=replace(CONFIG.tokenizer_stage, clip_norm=1e-3))
    trainer = Trainer(settings, CPU)
    meters = run(trainer, 1)[0]
    assert meters["tokenizer/grad_norm"] > 1e-3
    clipped = torch.cat([weight.grad.flatten() for weight in trainer.model.tokenizer.parameters()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


# Schedules


@given(st.integers(1, 500), st.integers(0, 60))
def test_the_learning_rate_rises_then_falls_to_nearly_nothing(steps: int, warmup: int) -> None:
    stage = replace(CONFIG.flam_stage, steps=steps, warmup=warmup, learning_rate=0.3)
    rates = [learning_rate(stage, step) for step in range(steps)]
    assert all(0 < rate <= 0.3 for rate in rates)
    after = rates[max(warmup - 1, 0) :]
    assert after == sorted(after, reverse=True)
    cosine = [0.15 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    shares = [min(1.0, (step + 1) / max(1, warmup)) for step in range(steps)]
    assert rates == pytest.approx([share * full for share, full in zip(shares, cosine, strict=True)])


def test_the_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(replace(CONFIG.flam_stage, warmup=0), 0) == CONFIG.flam_stage.learning_rate


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_beta_never_falls_and_stays_between_zero_and_its_value(a: float, b: float, one: float, other: float) -> None:
    loss = LossConfig(beta=2.0, beta_warmup=(min(a, b), max(a, b)))
    earlier, later = beta_at(loss, min(one, other)), beta_at(loss, max(one, other))
    assert 0 <= earlier <= later <= 2


def test_beta_rises_between_the_two_shares() -> None:
    loss = LossConfig(beta=2.0, beta_warmup=(0.5, 0.9))
    assert [beta_at(loss, p) for p in (0.0, 0.49, 0.5, 0.7, 0.9, 1.0)] == pytest.approx([0, 0, 0, 1, 2, 2])
    assert [beta_at(LossConfig(beta=2.0), p) for p in (0.0, 0.5, 1.0)] == [2, 2, 2]
    assert [beta_at(LossConfig(beta=2.0, beta_warmup=(0.5, 0.5)), p) for p in (0.4, 0.6)] == [0, 2]


def test_beta_follows_the_progress_of_stage_2() -> None:
    trainer = started(config(beta=4.0, beta_warmup=(0.25, 0.75)), until=STAGE_1)
    betas = [float(meters["flam/beta"]) for meters in run(trainer, trainer.total_steps)]
    assert betas == pytest.approx([0, 0, 2, 4])
