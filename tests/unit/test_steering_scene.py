"""A scene steered step by step gives what a rollout gives, bit for bit, and goes back to where it was."""

from __future__ import annotations

import pytest
import torch

from flam_core.errors import DataError, SettingsError
from flam_core.steering.scene import Feedback, Scene
from tests.steering_fixture import clips, steered

STEPS = 6
BEYOND = 6
"""Frames that are more than the model's window of 4."""


@pytest.mark.parametrize("feedback", ["frames", "slots"])
@pytest.mark.parametrize("context", [1, 3, BEYOND])
@pytest.mark.parametrize("state", ["slots", "patches"])
def test_steps_are_those_of_a_rollout_bit_for_bit(state: str, context: int, feedback: Feedback) -> None:
    model, clip = steered(state=state), clips()[0]
    scene = Scene(model, clip[:context], feedback)
    actions = torch.randn(STEPS, model.factors, 8, generator=torch.Generator().manual_seed(1))
    drawn = torch.stack([scene.step(one) for one in actions])
    taken = torch.cat([scene.known_actions, actions])[None]
    expected = (model.rollout(clip[None, :context], taken, feedback)[0] * 255).round().to(torch.uint8)
    assert torch.equal(drawn, expected)
    assert scene.steps == STEPS
    assert torch.equal(scene.frame, drawn[-1])
    assert len(torch.unique(drawn.flatten(1), dim=0)) > 1  # or else nothing would be compared


@pytest.mark.parametrize("feedback", ["frames", "slots"])
def test_sampled_futures_are_those_of_imagine(feedback: Feedback) -> None:
    model, clip = steered(), clips()[0]
    scene, generator = Scene(model, clip[:2], feedback), torch.Generator().manual_seed(5)
    drawn = torch.stack([scene.step(scene.sample(generator)) for _ in range(STEPS)])
    expected = model.imagine(clip[None, :2], STEPS, torch.Generator().manual_seed(5), feedback)[0][0]
    assert torch.equal(drawn, (expected * 255).round().to(torch.uint8))


@pytest.mark.parametrize("feedback", ["frames", "slots"])
def test_undo_gives_the_same_frames_again(feedback: Feedback) -> None:
    model = steered()
    scene, actions = Scene(model, clips()[0][:1], feedback), torch.randn(STEPS, 3, 8)
    states, frames = [], []
    for one in actions:
        states.append(scene.snapshot())
        frames.append(scene.step(one))
    for step in (4, 1):
        scene.restore(states[step])
        assert scene.steps == step
        assert torch.equal(scene.frame, frames[step - 1])
        assert torch.equal(scene.step(actions[step]), frames[step])


@pytest.mark.parametrize("feedback", ["frames", "slots"])
def test_looking_ahead_sees_what_a_step_gives_and_takes_none(feedback: Feedback) -> None:
    scene, actions = Scene(steered(), clips()[0][:1], feedback), torch.randn(3, 3, 8)
    before = scene.frame
    frames, places = scene.peek(actions)
    assert scene.steps == 0
    assert torch.equal(scene.frame, before)
    after = scene.step(actions[1])
    assert (frames[1].int() - after.int()).abs().max() <= 1  # three at a time are not rounded as one is
    assert places is not None
    assert scene.places is not None
    if feedback == "frames":
        assert torch.allclose(places[1], scene.places, atol=1e-3)


@pytest.mark.parametrize("feedback", ["frames", "slots"])
def test_masks_are_of_the_latest_frame(feedback: Feedback) -> None:
    model = steered()
    scene = Scene(model, clips()[0][:1], feedback)
    frames = [scene.frame, scene.step(torch.randn(3, 8)), scene.step(torch.randn(3, 8))]
    seen = model.slots(model.encode(torch.stack(frames)[None]))[1]
    assert seen is not None
    assert scene.masks is not None
    assert torch.allclose(scene.masks, seen[0, -1], atol=1e-5)
    assert torch.allclose(scene.masks.sum(dim=0), torch.ones(scene.masks.shape[1]))
    assert Scene(steered(state="patches"), clips()[0][:1], feedback).masks is None


def test_bad_input_is_refused_by_name() -> None:
    model, clip = steered(), clips()[0]
    for frames, why in (
        (clip[:1].float(), "float32"),
        (clip[:1, :32], r"\[1, 32, 48, 3\]"),
        (clip[:0], "t >= 1"),
        (clip[0], r"takes \[t, 48, 48, 3\]"),
    ):
        with pytest.raises(DataError, match=why):
            Scene(model, frames)
    scene = Scene(model, clip[:1])
    with pytest.raises(DataError, match=r"\[2, 8\], not \[3, 8\]"):
        scene.step(torch.zeros(2, 8))
    with pytest.raises(DataError, match="not finite"):
        scene.step(torch.full((3, 8), torch.nan))
    with pytest.raises(DataError, match="2 frames need"):
        Scene(model, clip[:2], known_actions=torch.zeros(2, 3, 8))
    with pytest.raises(SettingsError, match="no prior"):
        Scene(steered(latent="none"), clip[:1]).sample()
