"""The gate: a better model passes, a worse and an equal one do not, and a better one that leaks does not either."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.evaluate import Evaluation, evaluate
from flam_core.evaluation.paired import psnr_gain
from flam_core.evaluation.rollout import RolloutResult
from services.registry.gate import LATENCY, Margins, Measured, decide, latency_ms
from tests.evaluation_fixture import CONFIG, grid_clips, small_flam

FACTS = {"dci/i": 0.9, "leakage": 0.02, "actions/usage": 0.8, "horizon/psnr@5": 30.0}


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(small_flam(), grid_clips(12, 1), grid_clips(6, 2), grid_clips(6, 3), replace(CONFIG, clips=12), 0)


def measured(evaluation: Evaluation, version: str, times: Any = 1.0, latency: float = 10.0, **facts: Any) -> Measured:
    """A version whose errors are so many times those of the evaluation."""
    rollouts = evaluation.rollouts
    errors = {**rollouts.errors, "rollout": rollouts.errors["rollout"] * np.asarray(times).reshape(-1, 1)}
    metrics = {**FACTS, **{key.replace("__", "/"): value for key, value in facts.items()}}
    changed = replace(evaluation, rollouts=replace(rollouts, errors=errors), metrics=metrics)
    return Measured(version, changed, latency)


def gained(one: Measured, other: Measured) -> float:
    return psnr_gain(one.evaluation.rollouts, other.evaluation.rollouts, 0).mean


def test_a_better_model_becomes_champion(evaluation: Evaluation) -> None:
    better, champion = measured(evaluation, "2", 0.5), measured(evaluation, "1")
    decision = decide(better, champion, Margins(), 0)
    assert decision.promoted, decision.why
    assert gained(better, champion) == pytest.approx(10 * np.log10(2))
    assert decision.gain.low == pytest.approx(10 * np.log10(2))  # on every clip alike: no spread in the difference
    assert (decision.challenger, decision.champion) == ("2", "1")
    assert "every guard holds" in decision.why


@pytest.mark.parametrize("times", [1.0, 1.5])
def test_an_equal_and_a_worse_model_do_not(evaluation: Evaluation, times: float) -> None:
    decision = decide(measured(evaluation, "2", times), measured(evaluation, "1"), Margins(), 0)
    assert not decision.promoted
    assert "not shown to be better than version 1" in decision.why


def test_luck_on_a_few_clips_is_not_enough(evaluation: Evaluation) -> None:
    clips = len(evaluation.rollouts.ids)
    times = np.where(np.arange(clips) % 2 == 0, 0.7, 1.25)
    decision = decide(measured(evaluation, "2", times), measured(evaluation, "1"), Margins(), 0)
    assert decision.gain.low is not None
    assert decision.gain.low < 0
    assert not decision.promoted


@pytest.mark.parametrize(
    ("facts", "guard"),
    [
        ({"dci__i": 0.85}, "dci/i"),
        ({"leakage": 0.06}, "leakage"),
        ({"actions__usage": 0.6}, "actions/usage"),
        ({"horizon__psnr@5": 29.0}, "horizon/psnr@5"),
    ],
)
def test_a_better_model_that_is_worse_in_something_else_is_refused(
    evaluation: Evaluation, facts: dict[str, float], guard: str
) -> None:
    better, champion = measured(evaluation, "2", 0.5, **facts), measured(evaluation, "1")
    decision = decide(better, champion, Margins(), 0)
    assert not decision.promoted
    assert decision.why == f"it is better, but worse than its margin in {guard}"
    (failed,) = [one for one in decision.guards if not one.passed]
    assert failed.metric == guard
    wide = Margins(dci=1.0, leakage=1.0, usage=1.0, long_rollout_db=10.0)
    assert decide(better, champion, wide, 0).promoted


def test_a_slow_model_is_refused(evaluation: Evaluation) -> None:
    slow = measured(evaluation, "2", 0.5, latency=13.0)
    decision = decide(slow, measured(evaluation, "1"), Margins(), 0)
    assert [one.metric for one in decision.guards if not one.passed] == [LATENCY]


def test_what_the_champion_has_and_the_challenger_lacks_fails(evaluation: Evaluation) -> None:
    better, champion = measured(evaluation, "2", 0.5), measured(evaluation, "1")
    missing = {key: value for key, value in FACTS.items() if key != "leakage"}
    lacking = replace(better, evaluation=replace(better.evaluation, metrics=missing))
    assert not decide(lacking, champion, Margins(), 0).promoted
    neither = replace(champion, evaluation=replace(champion.evaluation, metrics=missing))
    assert decide(lacking, neither, Margins(), 0).promoted


def test_the_first_champion_must_beat_the_last_known_frame(evaluation: Evaluation) -> None:
    errors = evaluation.rollouts.errors
    good = measured(evaluation, "1", errors["copy"].mean() / errors["rollout"].mean() / 50)
    decision = decide(good, None, Margins(), 0)
    assert decision.promoted, decision.why
    assert decision.guards == ()
    bad = measured(evaluation, "1", 50.0)
    refused = decide(bad, None, Margins(), 0)
    assert not refused.promoted
    assert "repeating the last known frame" in refused.why


def test_other_clips_are_no_comparison(evaluation: Evaluation) -> None:
    rollouts = evaluation.rollouts
    others: RolloutResult = replace(rollouts, ids=tuple(reversed(rollouts.ids)))
    with pytest.raises(DataError, match="measured on different clips"):
        psnr_gain(rollouts, others, 0)


def test_a_decision_is_plain_json(evaluation: Evaluation) -> None:
    decision = decide(measured(evaluation, "2", 0.5), measured(evaluation, "1"), Margins(), 0)
    again = json.loads(json.dumps(decision.as_json()))
    assert again["promoted"] is True
    assert {guard["metric"] for guard in again["guards"]} == {*FACTS, LATENCY}


def test_a_margin_below_zero_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"margins.dci = -1"):
        Margins(dci=-1)


def test_latency_is_that_of_a_step() -> None:
    assert 0 < latency_ms(small_flam()) < 10_000
