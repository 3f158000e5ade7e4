"""Leakage and slot usage against models of which it is known what their latent actions change."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from flam_core.config_evaluation import EvaluationConfig
from flam_core.evaluation.context import Context, HeldOutClip
from flam_core.evaluation.correspondence import entity_of
from flam_core.evaluation.interventions import _distance, intervene
from flam_core.evaluation.leakage import LEAKAGE
from flam_core.evaluation.measure import Findings
from flam_core.evaluation.slots import SLOTS, used_slots, won_patches
from flam_core.model.flam import Flam
from tests.evaluation_fixture import CELLS, PatchPuppets, Puppets, puppet_clips, stub

CONFIG = EvaluationConfig(clips=30, horizon=5, probe_clips=30)


def stage(model: Flam, config: EvaluationConfig = CONFIG, clips: list[HeldOutClip] | None = None) -> Context:
    """The model before puppets."""
    test = puppet_clips(30, seed=2) if clips is None else clips
    return Context(model, test, puppet_clips(30, seed=1), test, config, 0)


def leakage(model: Flam, config: EvaluationConfig = CONFIG) -> Findings:
    return LEAKAGE.run(stage(model, config))


@pytest.mark.parametrize("replacement", ["other", "zero", "prior"])
def test_an_action_that_moves_its_own_entity_alone_does_not_leak(
    replacement: Literal["other", "zero", "prior"],
) -> None:
    found = leakage(stub(Puppets), replace(CONFIG, replacement=replacement))
    assert found.notes == ()
    of_slots = {"leakage/in_mask", "leakage/0/in_mask", "leakage/1/in_mask"}
    assert set(found.estimates) == {"leakage", "leakage@0", "leakage@1", *of_slots}
    assert set(found.metrics.values()) == {0.0}
    assert found.estimates["leakage"].n == 15


def test_an_action_that_moves_another_entity_leaks_altogether() -> None:
    found = leakage(stub(Puppets, factors=3, leak="swap"))
    assert found.metrics["leakage"] == pytest.approx(1.0)
    assert found.metrics["leakage@0"] == pytest.approx(1.0)
    assert "leakage@1" not in found.metrics  # that one's moves the third, which is not on the stage
    assert found.metrics["leakage/in_mask"] == found.metrics["leakage/0/in_mask"] == pytest.approx(1.0)
    assert "leakage/1/in_mask" not in found.metrics  # as above


def test_an_action_that_moves_both_entities_leaks_by_half() -> None:
    found = leakage(stub(Puppets, leak="led", factors=3))
    assert found.metrics["leakage"] == found.metrics["leakage@0"] == pytest.approx(0.5)
    assert found.metrics["leakage/in_mask"] == found.metrics["leakage/0/in_mask"] == pytest.approx(0.5)
    assert not {"leakage/1/in_mask", "leakage/2/in_mask"} & set(found.metrics)  # nothing follows their actions
    assert found.metrics["leakage_se"] == pytest.approx(0.0, abs=1e-6)


def test_a_model_without_slots_is_measured_by_its_action_probe() -> None:
    context = stage(stub(PatchPuppets))
    assert entity_of(context) == {0: 0, 1: 1}
    found = LEAKAGE.run(context)
    assert found.metrics["leakage"] == 0.0
    assert not [key for key in found.metrics if "in_mask" in key]
    assert found.notes == ("No leakage outside masks: the model has no slots.",)
    swapped = LEAKAGE.run(stage(stub(PatchPuppets, leak="swap")))
    assert swapped.metrics["leakage"] == pytest.approx(1.0)


def test_latent_actions_without_any_effect_are_named() -> None:
    class Deaf(Puppets):
        def rollout(self, frames_u8: torch.Tensor, actions: torch.Tensor, feedback: str = "slots") -> torch.Tensor:
            return super().rollout(frames_u8, torch.zeros_like(actions))

    found = leakage(stub(Deaf))
    assert found.metrics == {}
    assert len(found.notes) == 2
    assert all("changes nothing" in note for note in found.notes)


def test_entities_out_of_view_are_left_out() -> None:
    clips = puppet_clips(30, seed=2)
    for clip in clips[::2]:
        assert clip.positions is not None
        clip.positions[:, 0] = np.nan
    trials = intervene(stage(stub(Puppets), clips=clips))
    assert np.isnan(trials.outside_entity[::2, 0]).all()
    assert np.isfinite(trials.outside_entity[1::2]).all()
    assert np.isfinite(trials.outside_entity[:, 1]).all()
    assert LEAKAGE.run(stage(stub(Puppets), clips=clips)).metrics["leakage"] == 0.0


def test_numbers_of_a_trial_equal_those_by_hand() -> None:
    """A puppet that goes to another cell than predicted: two cells of one colour differ."""
    trials = intervene(stage(stub(Puppets)))
    assert not trials.error.any()  # the model is right
    per_cell = 1 / (3 * CELLS**2)
    np.testing.assert_allclose(np.unique(trials.change.round(6)), [0, 2 * per_cell], atol=1e-6)
    np.testing.assert_allclose(trials.replaced_error, trials.change)
    assert trials.change.shape == (2 * 30, 2)


def test_distance_is_the_larger_of_both_directions() -> None:
    distance = _distance(torch.tensor([[0.5, 0.25]]), (4, 8))[0]
    assert distance.shape == (4, 8)
    assert distance[0, 0] == pytest.approx(0.5 - 1 / 16)
    assert distance[3, 4] == pytest.approx(0.875 - 0.25)
    assert torch.isnan(_distance(torch.tensor([[torch.nan, 0.5]]), (4, 8))).all()


# --- slots in use ----------------------------------------------------------------------------------------------------


def test_slots_in_use_are_those_of_the_puppets() -> None:
    found = SLOTS.run(stage(stub(Puppets, factors=3)))
    assert found.metrics["slots/used"] == 2
    assert used_slots(found.metrics) == [0, 1]
    assert (found.metrics["slots/0/entity"], found.metrics["slots/1/entity"]) == (0, 1)
    assert "slots/2/entity" not in found.metrics
    assert min(found.metrics[f"slots/{i}/effect_db"] for i in (0, 1)) > 50  # from no error at all
    assert found.metrics["slots/2/effect_db"] == 0
    assert found.metrics["slots/steered"] == 1.0
    assert not any("does not steer" in note for note in found.notes)
    # Of the patches that change, half are left, by a puppet, and half are empty before.
    assert found.metrics["slots/2/moving_share"] == pytest.approx(0.5, abs=0.01)
    assert found.metrics["slots/2/mask_share"] == pytest.approx(62 / 64)
    shares = [found.metrics[f"slots/{i}/moving_share"] for i in range(3)]
    assert sum(shares) == pytest.approx(1.0)


def test_a_slot_that_holds_what_moves_is_in_use_whatever_its_action_does() -> None:
    class Fated(Puppets):
        def rollout(self, frames_u8: torch.Tensor, actions: torch.Tensor, feedback: str = "slots") -> torch.Tensor:
            return super().rollout(frames_u8, torch.zeros_like(actions))

    found = SLOTS.run(stage(stub(Fated, factors=3)))
    assert [found.metrics[f"slots/{i}/effect_db"] for i in range(3)] == [0, 0, 0]
    assert used_slots(found.metrics) == [0, 1]
    assert found.metrics["slots/steered"] == 0.0


def test_an_entity_that_another_slots_action_moves_is_named() -> None:
    """Slot 1 stands for entity 1 in the picture, and slot 2's latent action moves it."""

    class Displaced(Puppets):
        def rollout(self, frames_u8: torch.Tensor, actions: torch.Tensor, feedback: str = "slots") -> torch.Tensor:
            return super().rollout(frames_u8, actions[:, :, [0, 2, 1]])

    found = SLOTS.run(stage(stub(Displaced, factors=3)))
    assert found.metrics["slots/1/entity"] == 1
    assert found.metrics["slots/steered"] == 0.5
    (note,) = (note for note in found.notes if "does not steer" in note)
    assert note.startswith("Slot 1 stands for entity 1 and does not steer it")


def test_where_nothing_moves_no_slot_claims_it() -> None:
    clips = puppet_clips(30, seed=2)
    for clip in clips:
        clip.frames[:] = clip.frames[:1]
    found = SLOTS.run(stage(stub(Puppets, factors=3), clips=clips))
    assert "slots/0/moving_share" not in found.metrics
    assert "nothing moves" in " ".join(found.notes)
    assert found.metrics["slots/used"] == 0  # nor does any act: other clips' latent actions are zero too


def test_won_patches_are_counted_frame_by_frame() -> None:
    context = stage(stub(Puppets, factors=3))
    moving, everything = won_patches(context.held_out)
    assert everything.shape == (30, 3)
    np.testing.assert_array_equal(everything, np.tile([5, 5, 5 * 62], (30, 1)))
    clip = puppet_clips(30, seed=2)[7]
    assert clip.positions is not None
    steps = (np.abs(np.diff(clip.positions[:6], axis=0)).sum(axis=2) > 0).sum(axis=0)
    np.testing.assert_array_equal(moving[7], [steps[0], steps[1], steps.sum()])
    with pytest.raises(ValueError, match="no masks"):
        won_patches(stage(stub(PatchPuppets)).held_out)
