"""Evaluation: image metrics and DCI against values known by hand, and what the report holds."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from torch import Tensor, nn

from flam_core.config import EvaluationConfig, ModelConfig, TokenizerConfig
from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.dci import MIN_SAMPLES, DCIResult, dci
from flam_core.evaluation.evaluate import Evaluation, HeldOutClip, evaluate
from flam_core.evaluation.pictures import curves_png, rollout_gif, rollout_png, slots_png
from flam_core.evaluation.report import verdict, write_report
from flam_core.evaluation.rollout import EXAMPLES, PSNR_CAP, derangement, evaluate_rollouts, frame_ssim, psnr
from flam_core.model.flam import Flam
from flam_core.worlds.grid import GridWorld

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
CONFIG = EvaluationConfig(clips=6, horizon=3, context=1, probe_clips=6)


class Oracle(nn.Module):
    """Stands in for Flam: its slots are the pixels and its latent action is the next frame, which it then predicts."""

    def __init__(self, factors: int = 2, offset: float = 0.0) -> None:
        super().__init__()
        self.factors, self.offset = factors, offset
        self.anchor = nn.Parameter(torch.zeros(()))
        self.size: tuple[int, ...] = ()

    def encode(self, frames_u8: Tensor) -> Tensor:
        self.size = tuple(frames_u8.shape[2:])
        return (frames_u8.float() / 255).flatten(2, 3)

    def decode(self, z: Tensor) -> Tensor:
        return z.reshape(*z.shape[:2], *self.size)

    def slots(self, z: Tensor) -> tuple[Tensor, Tensor]:
        slots = z.flatten(2)[:, :, None].expand(-1, -1, self.factors, -1)
        return slots, torch.full((*z.shape[:2], self.factors, z.shape[2]), 1 / self.factors)

    def infer_actions(self, slots: Tensor) -> Tensor:
        return slots[:, 1:]

    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: str = "slots") -> Tensor:
        known = frames_u8.shape[1] - 1
        return self.decode(actions[:, known:, 0]) + self.offset


class Copier(Oracle):
    """Predicts that nothing happens."""

    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: str = "slots") -> Tensor:
        return (frames_u8[:, -1:].float() / 255).expand(-1, actions.shape[1] - frames_u8.shape[1] + 1, -1, -1, -1)


def stub(kind: type[Oracle], **options: Any) -> Flam:
    """A stand-in, typed as what it stands in for."""
    return cast(Flam, kind(**options))


def noise(clips: int = 6, frames: int = 4, seed: int = 0) -> Tensor:
    """Random frames uint8 [clips, frames, 16, 16, 3]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=(clips, frames, 16, 16, 3), dtype=np.uint8))


def small_flam(factors: int = 3) -> Flam:
    """A real model with random weights."""
    torch.manual_seed(0)
    return Flam(
        TokenizerConfig(frame_size=48, unshuffle=4, channels=(16,), feature_dim=16),
        ModelConfig(factors=factors, width=32, heads=4, latent_width=24),
    )


def grid_clips(count: int, seed: int, frames: int = 5, truth: bool = True) -> list[HeldOutClip]:
    """Clips of the built-in grid world."""
    world = GridWorld(agents=2, cells=6, walls=2, frame_size=48)
    return [
        HeldOutClip(f"clip-{e}", f"episode-{e}", episode.frames, episode.positions if truth else None, episode.actions)
        for e, episode in enumerate(world.episodes(count, frames, seed))
    ]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(small_flam(), grid_clips(6, 1), grid_clips(6, 2), grid_clips(6, 3), CONFIG, seed=0)


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_equal_hand_computed_values() -> None:
    assert psnr(np.array([1.0, 0.01, 0.0])).tolist() == pytest.approx([0.0, 20.0, PSNR_CAP])
    # Frames of one colour have no variance: SSIM is its luminance term alone, with (0.01 * range)^2 to steady it.
    a, b = torch.full((1, 1, 16, 16, 3), 0.2), torch.full((1, 1, 16, 16, 3), 0.6)
    assert frame_ssim(a, b).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-3)
    assert frame_ssim(a, a).item() == pytest.approx(1.0)


def test_perfect_prediction_scores_the_cap_and_shuffled_does_not() -> None:
    result = evaluate_rollouts(stub(Oracle), noise(), CONFIG, seed=0)
    for k in (1, 2, 3):
        assert result.metrics[f"rollout/psnr@{k}"] == result.metrics[f"ceiling/psnr@{k}"] == PSNR_CAP
        assert result.metrics[f"rollout/ssim@{k}"] == pytest.approx(1.0)
        assert result.metrics[f"rollout/psnr_se@{k}"] == 0.0
        assert result.metrics[f"shuffled/psnr@{k}"] < 10
        assert result.metrics[f"copy/psnr@{k}"] < 10
    np.testing.assert_array_equal(result.prediction, result.truth)


def test_constant_offset_gives_its_known_psnr() -> None:
    frames = torch.full((3, 4, 16, 16, 3), 51, dtype=torch.uint8)
    metrics = evaluate_rollouts(stub(Oracle, offset=0.1), frames, CONFIG, seed=0).metrics
    assert metrics["rollout/psnr@1"] == metrics["rollout/psnr"] == pytest.approx(20.0, abs=1e-4)
    assert metrics["rollout/ssim@3"] == pytest.approx((2 * 0.2 * 0.3 + 1e-4) / (0.2**2 + 0.3**2 + 1e-4), abs=1e-4)
    assert metrics["copy/psnr@3"] == PSNR_CAP  # nothing moves


def test_copying_model_equals_the_copy_baseline_with_several_known_frames() -> None:
    config = EvaluationConfig(horizon=2, context=2)
    result = evaluate_rollouts(stub(Copier), noise(), config, seed=0)
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
    metrics = evaluate_rollouts(stub(Oracle), frames, EvaluationConfig(horizon=1), seed=0).metrics
    assert metrics["copy/psnr@1"] == pytest.approx(-10 * np.log10(0.02), abs=1e-4)
    assert metrics["copy/psnr_se@1"] > 0


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_derangement_moves_everything(count: int) -> None:
    for seed in range(20):
        moved = derangement(count, np.random.default_rng(seed))
        assert sorted(moved) == list(range(count))
        assert (moved != np.arange(count)).all()


def test_shuffled_predictions_come_from_another_clip() -> None:
    result = evaluate_rollouts(stub(Oracle), noise(clips=3), CONFIG, seed=5, batch=2)
    for i, shown in enumerate(result.shuffled[:, 1:]):
        origin = [j for j, true in enumerate(result.truth[:, 1:]) if np.array_equal(shown, true)]
        assert len(origin) == 1
        assert origin != [i]


def test_equal_seeds_give_equal_numbers_whatever_the_batch() -> None:
    first, second = (evaluate_rollouts(stub(Oracle, offset=0.1), noise(), CONFIG, 3, batch) for batch in (2, 16))
    assert first.metrics == pytest.approx(second.metrics)
    assert first.truth.shape == second.truth.shape == (EXAMPLES, 4, 16, 16, 3)
    np.testing.assert_array_equal(first.shuffled, second.shuffled)


def test_single_factor_has_no_masks() -> None:
    result = evaluate_rollouts(stub(Oracle, factors=1), noise(), CONFIG, seed=0)
    assert result.masks is None
    with pytest.raises(ValueError, match="no masks"):
        slots_png(result)


def test_unusable_clips_are_refused() -> None:
    with pytest.raises(DataError, match="another clip"):
        evaluate_rollouts(stub(Oracle), noise(clips=1), CONFIG, seed=0)
    with pytest.raises(DataError, match="5 frames, not context 1"):
        evaluate_rollouts(stub(Oracle), noise(frames=5), CONFIG, seed=0)
    with pytest.raises(TrainingFailed, match="rollout frames are not finite"):
        evaluate_rollouts(stub(Oracle, offset=float("nan")), noise(), CONFIG, seed=0)


# --- DCI -------------------------------------------------------------------------------------------------------------


def positions(samples: int, agents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((samples, agents, 2)).astype(np.float32)


def embed(known: np.ndarray, seed: int, width: int = 12) -> np.ndarray:
    """Slots [N, width]: a fixed linear picture of `known` [N, m] in random directions, with a little noise."""
    directions = np.random.default_rng(99).normal(size=(known.shape[1], width))
    return known @ directions + 1e-3 * np.random.default_rng(seed).normal(size=(len(known), width))


def measure(build: Callable[[np.ndarray, int], np.ndarray], agents: int = 3, samples: int = 400) -> DCIResult:
    """DCI of the slots that `build(positions, seed)` makes, on independent train and test positions."""
    train, test = positions(samples, agents, 1), positions(samples, agents, 2)
    return dci(build(train, 3), train, build(test, 4), test)


def random_slots(count: int, samples: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(count, samples, 12)))


def test_one_slot_per_agent_is_perfect() -> None:
    result = measure(lambda p, s: np.stack([embed(p[:, a], s) for a in (2, 0, 1)], axis=1))
    assert (result.d, result.c, result.i, result.within) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert result.matching == ((0, 2), (1, 0), (2, 1))
    assert set(result.metrics) == {
        *("dci/d", "dci/c", "dci/i", "dci/within"),
        *(f"probe/position_r2@{a}" for a in range(3)),
    }


def test_slots_that_all_know_everything_are_not_disentangled() -> None:
    result = measure(lambda p, s: np.stack([embed(p.reshape(len(p), -1), s)] * 3, axis=1))
    assert result.d < 0.01
    assert result.c < 0.01
    assert result.i > 0.98


def test_one_slot_that_knows_all_is_complete_but_not_disentangled() -> None:
    def build(p: np.ndarray, s: int) -> np.ndarray:
        return np.stack([embed(p.reshape(len(p), -1), s), *random_slots(2, len(p), s)], axis=1)

    result = measure(build)
    assert result.d < 0.01
    assert result.c > 0.99
    assert result.i == pytest.approx(1 / 3, abs=0.02)  # a slot speaks for one entity only


def test_random_slots_know_nothing() -> None:
    result = measure(lambda p, s: np.stack(random_slots(3, len(p), s), axis=1))
    assert max(result.d, result.c, result.i) < 0.02


def test_d_and_c_equal_an_independent_computation() -> None:
    rng = np.random.default_rng(7)
    mixing = rng.random((4, 3))

    def build(p: np.ndarray, s: int) -> np.ndarray:
        noisy = [p * m[None, :, None] + 0.1 * np.random.default_rng(s).normal(size=p.shape) for m in mixing]
        return np.stack([embed(x.sum(axis=1), s) for x in noisy], axis=1)

    result = measure(build)
    r = result.importance
    assert (r > 0).sum() > 6
    weights = r.sum(axis=1) / r.sum()
    assert r.any(axis=0).all()
    assert r.any(axis=1).all()
    assert result.d == pytest.approx(float(weights @ (1 - np.asarray(entropy(r, base=3, axis=1)))))
    assert result.c == pytest.approx(float(np.mean(1 - np.asarray(entropy(r, base=4, axis=0)))))


def test_absent_entities_are_left_out_sample_by_sample() -> None:
    train, test = positions(400, 2, 1), positions(400, 2, 2)
    slots = [np.stack([embed(p[:, a], s) for a in range(2)], axis=1) for s, p in ((3, train), (4, test))]
    for p, s, seed in ((train, slots[0], 5), (test, slots[1], 6)):
        away = np.random.default_rng(seed).random(400) < 0.5
        p[away, 1] = np.nan
        s[away, 1] = 1e3  # would ruin the probe if these samples were used
    result = dci(slots[0], train, slots[1], test)
    assert (result.d, result.c, result.i) == pytest.approx((1, 1, 1), abs=0.01)


def test_entities_that_cannot_be_probed_are_left_out_altogether() -> None:
    train, test = positions(400, 4, 1), positions(400, 4, 2)
    slots = [np.stack([embed(p[:, a], s) for a in range(2)], axis=1) for s, p in ((3, train), (4, test))]
    for p in (train, test):
        p[:, 2] = 0.5  # never moves
        p[MIN_SAMPLES - 1 :, 3] = np.nan  # hardly ever in view
    result = dci(slots[0], train, slots[1], test)
    assert result.entities == (0, 1)
    assert result.importance.shape == (2, 4)
    assert not result.importance[:, 2:].any()
    assert (result.d, result.c, result.i) == pytest.approx((1, 1, 1), abs=0.01)
    train[:] = 0.5
    with pytest.raises(DataError, match="none of 4 entities"):
        dci(slots[0], train, slots[1], test)


def test_fewer_slots_than_agents() -> None:
    result = measure(lambda p, s: np.stack([embed(p[:, a], s) for a in range(2)], axis=1), agents=3)
    assert result.d == pytest.approx(1, abs=0.01)
    assert result.c == pytest.approx(2 / 3, abs=0.01)  # nobody knows of the third
    assert result.i == pytest.approx(2 / 3, abs=0.01)
    assert set(result.position_r2) == {0, 1}


def test_one_slot_and_one_agent_are_defined() -> None:
    one_agent = measure(lambda p, s: np.stack([embed(p[:, 0], s)] * 2, axis=1), agents=1)
    assert one_agent.d == 1
    assert one_agent.c < 0.01
    assert one_agent.i > 0.98
    one_slot = measure(lambda p, s: embed(p.reshape(len(p), -1), s)[:, None], agents=3)
    assert one_slot.d < 0.01
    assert one_slot.c == 1
    assert one_slot.i == pytest.approx(1 / 3, abs=0.01)
    neither = measure(lambda p, s: np.stack(random_slots(1, len(p), s), axis=1), agents=1)
    assert (neither.d, neither.c, neither.i) == pytest.approx((0, 0, 0), abs=0.02)


@pytest.mark.parametrize("seed", range(12))
def test_all_numbers_stay_in_the_unit_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, agents, width, samples = rng.integers(1, 6), rng.integers(1, 6), rng.integers(1, 40), rng.integers(20, 80)
    splits = []
    for _ in range(2):
        p = rng.random((samples, agents, 2))
        s = rng.normal(size=(samples, slots, width)) * 10.0 ** rng.integers(-9, 9, size=width)
        s[..., 0] += p[:, :1, 0]
        s[..., -1] = 1.0
        p[rng.random((samples, agents)) < 0.2] = np.nan
        splits += [s, p]
    splits[0][:, 0] = splits[0][0, 0]  # a slot that is constant on train only
    result = dci(*splits)
    numbers = [*result.metrics.values(), *result.importance.ravel()]
    assert np.isfinite(numbers).all()
    assert min(numbers) >= 0
    assert max(numbers) <= 1


def test_shapes_and_numbers_that_make_no_sense_are_refused() -> None:
    p = positions(40, 2, 0)
    s = np.random.default_rng(0).normal(size=(40, 3, 4))
    with pytest.raises(DataError, match="do not belong together"):
        dci(s[:30], p, s, p)
    with pytest.raises(DataError, match="train has slots"):
        dci(s, p, s[:, :2], p)
    with pytest.raises(TrainingFailed, match="not finite"):
        dci(s * np.nan, p, s, p)


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_measures_everything_on_a_real_model(evaluation: Evaluation) -> None:
    assert evaluation.notes == ()
    assert evaluation.correspondence is not None
    assert evaluation.rollouts.masks is not None
    assert evaluation.rollouts.masks.shape == (4, 4, 3, 36)
    assert all(np.isfinite(value) for value in evaluation.metrics.values())
    again = evaluate(small_flam(), grid_clips(6, 1), grid_clips(6, 2), grid_clips(6, 3), CONFIG, seed=0)
    assert again.metrics == evaluation.metrics


def test_evaluate_restores_the_mode_of_each_module() -> None:
    model = small_flam().train()
    model.tokenizer.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, grid_clips(2, 1), [], [], CONFIG, seed=0)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(DataError):
        evaluate(model, grid_clips(1, 1), [], [], CONFIG, seed=0)
    assert [module.training for module in model.modules()] == modes


def test_short_clips_are_passed_over_and_lengths_are_named() -> None:
    model = small_flam()
    short = grid_clips(2, 1, frames=2) + grid_clips(1, 1, frames=3)
    with pytest.raises(DataError, match=r"no clip has the 4 frames .*lengths: 2, 3"):
        evaluate(model, short, [], [], CONFIG, seed=0)
    with pytest.raises(DataError, match="no clips at all"):
        evaluate(model, [], [], [], CONFIG, seed=0)
    result = evaluate(model, short + grid_clips(9, 1), short + grid_clips(2, 2), grid_clips(9, 3), CONFIG, seed=0)
    assert result.rollouts.clips == CONFIG.clips


def test_without_ground_truth_dci_is_absent_and_the_reason_is_given() -> None:
    blind = grid_clips(3, 2, truth=False)
    result = evaluate(small_flam(), grid_clips(2, 1), blind, blind, CONFIG, seed=0)
    assert result.correspondence is None
    assert not [key for key in result.metrics if key.startswith(("dci/", "probe/"))]
    assert result.notes == ("No DCI: no train clip has ground-truth positions and 4 frames.",)


# --- report ----------------------------------------------------------------------------------------------------------


def documented_keys() -> set[str]:
    """First column of the tables in docs/metrics.md that name a whole key."""
    return set(re.findall(r"^\| `([a-z0-9_/@<>]+[a-z0-9>])` \|", DOCS.read_text(), re.MULTILINE))


def test_every_key_is_documented_and_every_documented_key_exists(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(tmp_path, evaluation.rollouts, evaluation.metrics, {})
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == evaluation.metrics
    assert list(written) == sorted(written)
    general = {re.sub(r"@\d+$", "@<entity>" if key.startswith("probe/") else "@k", key) for key in written}
    assert general == documented_keys()
    for source in ("rollout", "copy", "shuffled", "ceiling"):
        assert {f"{source}/{name}@{k}" for name in ("psnr", "ssim") for k in (1, 2, 3)} <= set(written)


def test_report_is_self_contained_and_escapes_what_it_shows(evaluation: Evaluation, tmp_path: Path) -> None:
    info = {"recipe": '<script>alert("x")</script>', "a & b": "multigrid"}
    page = write_report(tmp_path / "deep" / "er", evaluation.rollouts, evaluation.metrics, info, ["<i>odd</i>"])
    assert sorted(p.name for p in page.parent.iterdir()) == sorted(
        ["metrics.json", "rollout.png", "rollout.gif", "curves.png", "slots.png", "report.html"]
    )
    text = page.read_text()
    assert text.count("data:image/") == 4
    text = re.sub(r"data:image/(png|gif);base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|url\(|@import|<link|<script|<i>", text)
    assert set(re.findall(r'src="([^"]*)"', text)) == {""}
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert "<td>a &amp; b</td>" in text
    assert "&lt;i&gt;odd&lt;/i&gt;" in text
    for key in ("rollout/psnr@1", "rollout/psnr@3", "copy/psnr@3", "shuffled/psnr@3", "ceiling/psnr", "dci/d"):
        assert f"<code>{key}</code>" in text


def test_report_without_ground_truth_or_masks_says_so(tmp_path: Path) -> None:
    (tmp_path / "slots.png").write_bytes(b"of an earlier report")
    result = evaluate_rollouts(stub(Oracle, factors=1), noise(), CONFIG, seed=0)
    text = write_report(tmp_path, result, result.metrics, {}, ["No DCI: no positions."]).read_text()
    assert "D, C and I are missing" in text
    assert "No DCI: no positions." in text
    assert not (tmp_path / "slots.png").exists()
    assert "What each slot looks at" not in text


def test_nothing_is_written_if_a_number_is_not_finite(evaluation: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "r", evaluation.rollouts, evaluation.metrics | {"dci/d": float("nan")}, {})
    assert not (tmp_path / "r").exists()


def test_verdict_tells_what_the_numbers_say() -> None:
    perfect = evaluate_rollouts(stub(Oracle), noise(), CONFIG, seed=0)
    said = " ".join(verdict(perfect, perfect.metrics))
    assert "better than repeating" in said
    assert "the latent actions matter" in said
    copier = evaluate_rollouts(stub(Copier), noise(), CONFIG, seed=0)
    said = " ".join(verdict(copier, copier.metrics))
    assert "no better or worse than repeating" in said
    assert "do not seem to matter" in said
    blurred = copier.metrics | {"rollout/psnr@3": 99.0, "rollout/ssim@3": -0.5}
    assert "blurs" in " ".join(verdict(copier, blurred))


def test_pictures_open_and_are_equal_for_equal_results(evaluation: Evaluation) -> None:
    film = Image.open(io.BytesIO(rollout_gif(evaluation.rollouts)))
    assert getattr(film, "n_frames", 1) == 4
    assert film.width > 4 * 224
    for first, second in (
        (rollout_png(evaluation.rollouts), rollout_png(evaluation.rollouts)),
        (slots_png(evaluation.rollouts), slots_png(evaluation.rollouts)),
        (curves_png(evaluation.metrics), curves_png(evaluation.metrics)),
    ):
        assert first == second
        assert b"matplotlib.org" not in first
        assert Image.open(io.BytesIO(first)).width > 500
