"""The measures together: what runs, what is missing and why, and that nothing else is disturbed."""

from __future__ import annotations

import typing
from dataclasses import replace

import numpy as np
import pytest
import torch

from flam_core.config_evaluation import EvaluationConfig, Measured
from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.evaluate import MEASURES, Evaluation, evaluate, measure
from tests.evaluation_fixture import CONFIG, grid_clips, small_flam

NO_WEIGHTS = (
    "No LPIPS: no weights are given (evaluation.lpips_weights).",
    "No FVD: no weights are given (evaluation.fvd_weights).",
)


def measured(**options: typing.Any) -> Evaluation:
    """Of a real model on the grid world, with all ground truth."""
    clips = grid_clips(6, 1), grid_clips(6, 2), grid_clips(6, 3)
    return evaluate(small_flam(**options), *clips, CONFIG, 0, grid_clips(4, 4, 12))


def prefixes(metrics: typing.Iterable[str]) -> set[str]:
    return {key.split("/")[0].split("@")[0].removesuffix("_se") for key in metrics}


def not_of_slots(notes: tuple[str, ...]) -> tuple[str, ...]:
    """Without those on slots that do not steer what they stand for, as slots of random weights may not."""
    return tuple(note for note in notes if "does not steer" not in note)


def test_evaluate_measures_everything_on_a_real_model() -> None:
    evaluation = measured()
    assert not_of_slots(evaluation.notes) == NO_WEIGHTS
    assert evaluation.correspondence is not None
    assert evaluation.rollouts.masks is not None
    assert evaluation.rollouts.masks.shape == (4, 4, 3, 36)
    assert all(np.isfinite(value) for value in evaluation.metrics.values())
    assert {"rollout", "horizon", "dci", "action_probe", "leakage", "slots"} <= prefixes(evaluation.metrics)
    assert measured().metrics == evaluation.metrics


@pytest.mark.parametrize(
    ("options", "missing", "reasons"),
    [
        (
            {"state": "patches", "factors": 1},
            {"dci", "probe", "slots"},
            ["No DCI: the model has no slots.", "No slot usage: the model has no slots."],
        ),
        ({"state": "patches", "factors": 3}, {"dci", "probe", "slots"}, ["No DCI: the model has no slots."]),
        (
            {"latent": "none"},
            {"action_probe", "actions", "leakage", "zero", "random", "prior", "shuffled_time"},
            ["No action probe: the model has no latent actions of its own."],
        ),
        (
            {"latent": "true", "true_actions": (2, 1, 5), "state": "patches", "factors": 1},
            {"action_probe", "actions", "leakage", "dci", "probe", "slots", "prior"},
            ["No leakage: the model has no latent actions of its own.", "No prior control: the model is given true"],
        ),
        ({"latent": "vq"}, set(), []),
    ],
    ids=["monolithic", "grouped", "no actions", "true actions", "vq"],
)
def test_every_rival_is_measured_as_far_as_it_can_be(
    options: dict[str, typing.Any], missing: set[str], reasons: list[str]
) -> None:
    found, full = measured(**options), prefixes(measured().metrics)
    absent = full - prefixes(found.metrics)
    assert absent == missing
    assert all(np.isfinite(value) for value in found.metrics.values())
    said = " ".join(found.notes)
    assert not [reason for reason in reasons if reason not in said]
    if not options.get("latent") and options["state"] == "patches":
        assert "leakage" in found.metrics
        assert "leakage/in_mask" not in found.metrics


def test_a_slot_model_without_actions_still_has_its_slots_counted() -> None:
    found = measured(latent="none").metrics
    assert "slots/used" in found
    assert "slots/0/moving_share" in found
    assert "slots/0/effect_db" not in found


def test_evaluate_leaves_modes_and_random_numbers_as_they_were() -> None:
    model = small_flam().train()
    model.tokenizer.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate(model, grid_clips(2, 1), [], [], CONFIG, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError):
        evaluate(model, grid_clips(1, 1), [], [], CONFIG, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


def test_short_clips_are_passed_over_and_lengths_are_named() -> None:
    model = small_flam()
    short = grid_clips(2, 1, frames=2) + grid_clips(1, 1, frames=3)
    with pytest.raises(DataError, match=r"no clip has the 4 frames .*lengths: 2, 3"):
        evaluate(model, short, [], [], CONFIG, seed=0)
    with pytest.raises(DataError, match="no clips at all"):
        evaluate(model, [], [], [], CONFIG, seed=0)
    result = evaluate(model, short + grid_clips(9, 1), short + grid_clips(2, 2), grid_clips(9, 3), CONFIG, seed=0)
    assert result.rollouts.clips == CONFIG.clips


def test_without_ground_truth_what_needs_it_is_absent_and_the_reason_is_given() -> None:
    blind = grid_clips(3, 2, truth=False)
    result = evaluate(small_flam(), grid_clips(2, 1, truth=False), blind, blind, CONFIG, seed=0)
    assert result.correspondence is None
    assert not prefixes(result.metrics) & {"dci", "probe", "action_probe"}
    assert "leakage" not in result.metrics
    assert "leakage/in_mask" in result.metrics
    assert "slots/used" in result.metrics
    assert not_of_slots(result.notes) == (
        "The horizon curve ends at step 2, not 5: clips have 5 frames.",
        "No DCI: no train clip has ground-truth positions and 4 frames.",
        "No action probe: no train clip has true actions and 4 frames.",
        "No leakage outside entities: no train clip has ground-truth positions and 4 frames.",
        "No entities of slots: no train clip has ground-truth positions and 4 frames.",
        *NO_WEIGHTS,
    )


def test_registry_and_settings_name_the_same_measures() -> None:
    assert tuple(one.name for one in MEASURES) == typing.get_args(Measured) == EvaluationConfig().measures


def test_only_what_the_settings_name_is_measured() -> None:
    clips = grid_clips(6, 1), grid_clips(6, 2), grid_clips(6, 3)
    result = evaluate(small_flam(), *clips, replace(CONFIG, measures=("rollout", "slots")), 0)
    assert prefixes(result.metrics) >= {"rollout", "slots"}
    assert not prefixes(result.metrics) & {"dci", "probe", "action_probe", "leakage", "horizon"}
    assert result.correspondence is None
    assert not_of_slots(result.notes) == ()


def test_measures_while_training_are_few_and_disturb_nothing() -> None:
    model = small_flam().train()
    clips = grid_clips(6, 1), grid_clips(6, 2), grid_clips(6, 3)
    state = torch.get_rng_state()
    found = measure(model, *clips, replace(CONFIG, during_clips=5), 0, ("dci", "leakage"))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert prefixes(found.metrics) == {"dci", "probe", "leakage"}
    assert found.estimates["dci/d"].n == found.estimates["leakage/in_mask"].n == 5
    nothing = measure(model, [], [], [], CONFIG, 0, ("rollout", "dci"))
    assert nothing.metrics == {}
    assert nothing.notes[0].startswith("No rollouts: no clip has the 4 frames")


def test_each_measure_has_a_cadence_of_its_own() -> None:
    config = EvaluationConfig(during=(("rollout", 2), ("dci", 3)))
    assert [config.due(step) for step in range(7)] == [
        *((), (), ("rollout",), ("dci",), ("rollout",), (), ("rollout", "dci"))
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ("dci",)}, 'Add "rollout"'),
        ({"during": (("dci", 0),)}, "during has dci 0"),
        ({"during": (("dci", 5), ("dci", 6))}, "names one twice"),
        ({"lpips_weights": "a.safetensors"}, "belong together"),
        ({"fvd_sha256": "0" * 64}, "belong together"),
        ({"long_horizon": 0}, "long_horizon = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EvaluationConfig(**options)
