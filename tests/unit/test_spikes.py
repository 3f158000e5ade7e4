"""Losses that leap, and those that only wander."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from flam_core.learning.cost import step_flops
from flam_core.learning.spikes import SpikeWatch
from flam_core.learning.trainer import Trainer
from tests.unit.test_trainer import CONFIG, CPU, STAGE_1, batch, run, started


def watching(losses: list[float], factor: float = 10.0) -> SpikeWatch:
    watch = SpikeWatch(factor)
    assert not any(watch.spike(loss) for loss in losses)
    return watch


def test_a_leap_is_a_spike_and_is_not_remembered() -> None:
    watch = watching([0.1 + 0.001 * (n % 7) for n in range(60)])
    assert watch.spike(2.0)
    assert watch.spike(2.0)
    assert not watch.spike(0.11)


def test_a_wandering_loss_is_none() -> None:
    watching([1.0 / (1 + n) for n in range(200)])
    watching([0.1 * 1.02**n for n in range(200)])


def test_nothing_is_judged_by_a_few_losses() -> None:
    assert not watching([0.1] * 20).spike(50.0)


def test_what_leapt_before_may_leap_again() -> None:
    """Three times the largest: a loss of rare large values is as it is."""
    watch = watching([0.1] * 45 + [0.9] + [0.1] * 30)
    assert not watch.spike(2.5)
    assert watch.spike(9.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", [0.0, 10.0])
def test_what_is_not_finite_always_is_a_spike(loss: float, factor: float) -> None:
    assert SpikeWatch(factor).spike(loss)


def test_off_is_off() -> None:
    assert not watching([0.1] * 80, factor=0.0).spike(1e9)


def test_a_stage_of_its_own_starts_anew_and_a_state_goes_on() -> None:
    watch = watching([0.1] * 60)
    again = SpikeWatch(10.0, watch.state())
    assert again.spike(5.0)
    again.forget()
    assert not again.spike(5.0)


def test_a_step_that_is_passed_over_changes_nothing_but_the_count() -> None:
    trainer = started(until=1)
    before = trainer.state()
    trainer.pass_over(batch(trainer)[0])
    after = trainer.state()
    assert before is not None
    assert after is not None
    assert after.model == before.model
    assert (after.meta["step"], after.meta["consumed"]) == (2, before.meta["consumed"])


def test_the_first_step_of_flam_may_be_passed_over() -> None:
    trainer = started(until=STAGE_1)
    trainer.pass_over(batch(trainer)[0])
    run(trainer, trainer.total_steps)
    assert trainer.step == trainer.total_steps


@pytest.mark.parametrize("stage", [0, 1])
def test_the_cost_of_a_step_grows_with_the_batch(stage: int) -> None:

    name = ("tokenizer_stage", "flam_stage")[stage]
    larger = replace(CONFIG, **{name: replace(getattr(CONFIG, name), batch_clips=8)})
    assert step_flops(larger, stage, CPU) == 4 * step_flops(CONFIG, stage, CPU) > 0
    assert Trainer(CONFIG, CPU).step == 0
