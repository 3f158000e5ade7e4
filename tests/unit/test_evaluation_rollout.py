"""Rollouts and image metrics against values known by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flam_core.config_evaluation import EvaluationConfig
from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.context import Context, HeldOutClip, derangement
from flam_core.evaluation.horizon import HORIZON
from flam_core.evaluation.image import PSNR_CAP, frame_ssim, psnr
from flam_core.evaluation.pictures import slots_png
from flam_core.evaluation.rollout import CONTROLS, EXAMPLES, SOURCES, evaluate_rollouts
from flam_core.model.latent_action import LatentActions
from tests.evaluation_fixture import (
    CONFIG,
    Copier,
    Oracle,
    Puppets,
    context,
    filmed,
    latent_of,
    noise,
    puppet_clips,
    stub,
)


def test_psnr_and_ssim_equal_hand_computed_values() -> None:
    assert psnr(np.array([1.0, 0.01, 0.0])).tolist() == pytest.approx([0.0, 20.0, PSNR_CAP])
    # Frames of one colour have no variance: SSIM is its luminance term alone, with (0.01 * range)^2 to steady it.
    a, b = torch.full((1, 1, 16, 16, 3), 0.2), torch.full((1, 1, 16, 16, 3), 0.6)
    assert frame_ssim(a, b).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-3)
    assert frame_ssim(a, a).item() == pytest.approx(1.0)


def test_perfect_prediction_scores_the_cap_and_shuffled_does_not() -> None:
    result = evaluate_rollouts(context(stub(Oracle), noise()))
    for k in (1, 2, 3):
        assert result.metrics[f"rollout/psnr@{k}"] == result.metrics[f"ceiling/psnr@{k}"] == PSNR_CAP
        assert result.metrics[f"rollout/ssim@{k}"] == pytest.approx(1.0)
        assert result.metrics[f"rollout/psnr_se@{k}"] == 0.0
        assert result.metrics[f"shuffled/psnr@{k}"] < 10
        assert result.metrics[f"copy/psnr@{k}"] < 10
    np.testing.assert_array_equal(result.prediction, result.truth)


def test_constant_offset_gives_its_known_psnr() -> None:
    frames = torch.full((3, 4, 16, 16, 3), 51, dtype=torch.uint8)
    metrics = evaluate_rollouts(context(stub(Oracle, offset=0.1), frames)).metrics
    assert metrics["rollout/psnr@1"] == metrics["rollout/psnr"] == pytest.approx(20.0, abs=1e-4)
    assert metrics["rollout/ssim@3"] == pytest.approx((2 * 0.2 * 0.3 + 1e-4) / (0.2**2 + 0.3**2 + 1e-4), abs=1e-4)
    assert metrics["copy/psnr@3"] == PSNR_CAP  # nothing moves


def test_copying_model_equals_the_copy_baseline_with_several_known_frames() -> None:
    config = EvaluationConfig(horizon=2, context=2)
    result = evaluate_rollouts(context(stub(Copier), noise(), config))
    assert (result.context, result.horizon, result.clips) == (2, 2, 6)
    for name in ("psnr", "ssim"):
        for k in (1, 2):
            assert result.metrics[f"rollout/{name}@{k}"] == result.metrics[f"copy/{name}@{k}"]
    np.testing.assert_array_equal(result.prediction[:, 2], result.truth[:, 1])
    np.testing.assert_array_equal(result.prediction[:, :2], result.truth[:, :2])


def test_error_is_pooled_before_the_logarithm() -> None:
    """One clip that stands still has no error; the pooled PSNR is that of half the other's error."""
    frames = torch.zeros(2, 2, 16, 16, 3, dtype=torch.uint8)
    frames[1, 1] = 51  # 0.2: squared error 0.04 in one clip, 0 in the other
    metrics = evaluate_rollouts(context(stub(Oracle), frames, EvaluationConfig(horizon=1))).metrics
    assert metrics["copy/psnr@1"] == pytest.approx(-10 * np.log10(0.02), abs=1e-4)
    assert metrics["copy/psnr_se@1"] > 0


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_derangement_moves_everything(count: int) -> None:
    for seed in range(20):
        moved = derangement(count, np.random.default_rng(seed))
        assert sorted(moved) == list(range(count))
        assert (moved != np.arange(count)).all()


def test_shuffled_predictions_come_from_another_clip() -> None:
    result = evaluate_rollouts(context(stub(Oracle), noise(clips=20), replace(CONFIG, clips=20), seed=5))
    truth, shuffled = noise(clips=20)[:, 1:].numpy(), result.predicted["shuffled"]
    origins = [[j for j, true in enumerate(truth) if np.array_equal(shown, true)] for shown in shuffled]
    assert sorted(j for (j,) in origins) == list(range(20))
    assert all(j != i for i, (j,) in enumerate(origins))
    np.testing.assert_array_equal(result.shuffled[:, 1:], shuffled[:EXAMPLES])


def test_equal_seeds_give_equal_numbers() -> None:
    clips, config = noise(clips=20), replace(CONFIG, clips=20)
    first, second, other = (evaluate_rollouts(context(stub(Oracle, offset=0.1), clips, config, s)) for s in (3, 3, 4))
    assert first.metrics == second.metrics
    assert first.truth.shape == second.truth.shape == (EXAMPLES, 4, 16, 16, 3)
    np.testing.assert_array_equal(first.shuffled, second.shuffled)
    for source in ("shuffled", "shuffled_time", "random", "prior"):
        assert first.metrics[f"{source}/psnr"] != other.metrics[f"{source}/psnr"]


def test_controls_get_the_latent_actions_that_they_should() -> None:
    """The oracle predicts its latent action, so each control is the frame that it was given."""
    clips, config = noise(clips=5, frames=6), EvaluationConfig(clips=5, horizon=4, context=2)
    seen: list[np.ndarray] = []

    class Watched(Oracle):
        def rollout(self, frames_u8: torch.Tensor, actions: torch.Tensor, feedback: str = "slots") -> torch.Tensor:
            seen.append(actions[:, :, 0].reshape(5, 5, -1).numpy())
            return super().rollout(frames_u8, actions, feedback)

    evaluate_rollouts(context(stub(Watched), clips, config, train=noise(seed=9)))
    own, shuffled, in_time, zero, random, prior = seen
    np.testing.assert_allclose(own * 255, clips[:, 1:].flatten(2), atol=1e-4)
    assert all((shuffled[n] != own[n]).any() and any((shuffled[n] == other).all() for other in own) for n in range(5))
    orders = []
    for n in range(5):
        np.testing.assert_array_equal(in_time[n, 0], own[n, 0])  # between given frames: not tampered with
        orders.append([int((own[n] == frame).all(axis=1).argmax()) for frame in in_time[n, 1:]])
        assert sorted(orders[n]) == [1, 2, 3, 4]
        assert all(moved != t for t, moved in enumerate(orders[n], start=1))
    assert len({tuple(order) for order in orders}) > 1
    for control in (zero, random):
        np.testing.assert_array_equal(control[:, 0], own[:, 0])
    assert not zero[:, 1:].any()
    assert random[:, 1:].std() == pytest.approx(12**-0.5, abs=0.01)
    assert (prior != random).any()


def test_mean_frame_and_the_gaps_to_every_control() -> None:
    train = torch.full((3, 4, 16, 16, 3), 51, dtype=torch.uint8)
    frames = torch.full((4, 4, 16, 16, 3), 102, dtype=torch.uint8)
    metrics = evaluate_rollouts(context(stub(Oracle, offset=0.1), frames, train=train)).metrics
    assert metrics["mean/psnr@2"] == pytest.approx(-20 * np.log10(0.2), abs=1e-4)
    assert metrics["zero/psnr@2"] == pytest.approx(-20 * np.log10(0.3), abs=1e-4)
    assert metrics["delta_psnr/zero@2"] == pytest.approx(20 + 20 * np.log10(0.3), abs=1e-4)
    for control in CONTROLS:
        for at in ("", "@1", "@3"):
            gap = metrics[f"rollout/psnr{at}"] - metrics[f"{control}/psnr{at}"]
            assert metrics[f"delta_psnr/{control}{at}"] == pytest.approx(gap)
    assert metrics["delta_psnr/shuffled_se"] == 0.0  # all clips are alike: paired, nothing is left of the noise


def test_what_cannot_be_measured_is_named() -> None:
    def missing(model: str, horizon: int = 3, train: torch.Tensor | None = None) -> tuple[set[str], str]:
        config = replace(CONFIG, horizon=horizon)
        result = evaluate_rollouts(context(stub(Oracle, latent=model), noise(frames=1 + horizon), config, train=train))
        return set(SOURCES) - {key.split("/")[0] for key in result.metrics}, " ".join(result.notes)

    assert missing("gaussian", train=noise()) == (set(), "")
    assert missing("gaussian")[0] == {"mean"}
    absent, notes = missing("gaussian", horizon=1, train=noise())
    assert absent == {"shuffled_time"}
    assert "a rollout of one step" in notes
    absent, notes = missing("none", train=noise())
    assert absent == {"shuffled_time", "zero", "random", "prior"}
    assert "has no latent actions" in notes


def test_model_of_true_actions_is_given_them_and_has_no_prior() -> None:
    class Told(Oracle):
        def infer(self, slots: torch.Tensor, true_actions: torch.Tensor | None = None) -> LatentActions:
            assert true_actions is not None
            return latent_of(true_actions[:, :-1, :1] / 255 * torch.ones(16 * 16 * 3))

    frames = noise().numpy()
    frames[:] = frames[:, :, :1, :1, :1]
    told = np.roll(frames[:, :, 0, 0, 0].astype(np.float32), -1, axis=1)[:, :, None, None]
    clips = [HeldOutClip(f"{i}", f"{i}", frames[i], actions=told[i]) for i in range(6)]
    result = evaluate_rollouts(Context(stub(Told, latent="true"), clips, [], [], CONFIG, 0))
    assert result.metrics["rollout/psnr"] > 80
    assert "prior/psnr" not in result.metrics
    with pytest.raises(DataError, match="no true actions"):
        evaluate_rollouts(context(stub(Told, latent="true"), noise()))


def test_standard_errors_are_over_episodes() -> None:
    """Twelve clips of three episodes that are alike within each: as if there were three."""
    frames = noise(clips=3).repeat_interleave(4, dim=0)
    clips = [replace(clip, episode=f"{i // 4}") for i, clip in enumerate(filmed(frames))]
    config = replace(CONFIG, clips=12)
    grouped = evaluate_rollouts(Context(stub(Copier), clips, [], [], config, 0))
    three = evaluate_rollouts(context(stub(Copier), noise(clips=3), config))
    assert grouped.estimates["rollout/psnr@2"].n == 3
    assert grouped.estimates["rollout/psnr@2"].row == pytest.approx(three.estimates["rollout/psnr@2"].row)
    alone = evaluate_rollouts(Context(stub(Copier), [replace(clip, episode="0") for clip in clips], [], [], config, 0))
    assert alone.estimates["rollout/psnr@2"].n == 12
    assert "all of one episode" in " ".join(alone.notes)


def test_single_factor_has_no_masks() -> None:
    result = evaluate_rollouts(context(stub(Oracle, factors=1), noise()))
    assert result.masks is None
    with pytest.raises(ValueError, match="no masks"):
        slots_png(result)


def test_unusable_clips_are_refused() -> None:
    with pytest.raises(DataError, match="another clip"):
        evaluate_rollouts(context(stub(Oracle), noise(clips=1)))
    with pytest.raises(DataError, match="no clip has the 4 frames"):
        evaluate_rollouts(context(stub(Oracle), noise(frames=3)))
    with pytest.raises(TrainingFailed, match="rollout frames are not finite"):
        evaluate_rollouts(context(stub(Oracle, offset=float("nan")), noise()))


def test_horizon_curve_of_a_perfect_model_stays_up_while_copying_falls() -> None:
    clips = puppet_clips(6, frames=51, seed=1)
    config = EvaluationConfig(clips=2, long_clips=4)
    found = HORIZON.run(Context(stub(Puppets), puppet_clips(2), [], [], config, 0, clips))
    assert found.notes == ()
    steps = (1, 2, 5, 10, 20, 30, 40, 50)
    assert set(found.estimates) == {f"horizon/{name}@{k}" for name in ("psnr", "copy_psnr") for k in steps}
    for k in steps:
        frames = np.stack([clip.frames for clip in clips[:4]]).astype(np.float64) / 255
        error = np.square(frames[:, k] - frames[:, 0]).mean()
        assert found.metrics[f"horizon/psnr@{k}"] == PSNR_CAP
        assert found.metrics[f"horizon/copy_psnr@{k}"] == pytest.approx(psnr(error), abs=1e-4)


def test_horizon_curve_ends_with_the_clips_and_says_so() -> None:
    def run(lengths: list[int]) -> tuple[int, str]:
        clips = [clip for n, length in enumerate(lengths) for clip in puppet_clips(1, frames=length, seed=n)]
        found = HORIZON.run(Context(stub(Puppets), clips, [], [], EvaluationConfig(), 0))
        return max(int(key.split("@")[1]) for key in found.estimates), " ".join(found.notes)

    assert run([12, 33, 40]) == (30, "The horizon curve ends at step 30, not 50: clips have 33 frames.")
    assert run([11, 11])[0] == 10
    with pytest.raises(DataError, match="fewer than 2 clips have more than 1 frames"):
        run([1, 12])
