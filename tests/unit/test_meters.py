"""The meters: exact numbers on tensors made by hand, and what is made of them while small models really train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flam_core.config import Config, LossConfig, ModelConfig, StageConfig, TokenizerConfig
from flam_core.learning.collapse import CollapseWatch, Finding
from flam_core.learning.meters import latent_meters, tokenizer_meters
from flam_core.learning.trainer import Trainer
from flam_core.model import LatentActions, Prediction


def prediction(mean: Tensor, penalty: Tensor, codes: Tensor | None = None, masks: Tensor | None = None) -> Prediction:
    slots = torch.zeros(len(mean), mean.shape[1] + 1, mean.shape[2], 3)
    actions = LatentActions(mean, mean, penalty, codes)
    return Prediction(slots, masks, actions, slots[:, 1:], slots[:, 1:], prior_nll=torch.zeros_like(penalty))


def test_active_units_are_those_whose_mean_varies() -> None:
    mean = torch.full((64, 3, 2, 4), 7.0)  # far from zero, but the same for all: not active
    mean[:, :, 0, :2] += torch.randn(64, 3, 2)
    mean[:, :, 0, 2] += 0.05 * torch.randn(64, 3)  # a variance of 0.0025
    penalty = torch.tensor([3.0, 0.5]).expand(64, 3, 2)
    meters = {key: value.item() for key, value in latent_meters(prediction(mean, penalty)).items()}
    assert meters == {
        "flam/kl_slot_0": 3.0, "flam/kl_slot_1": 0.5,
        "flam/active_units": 0.25, "flam/active_units_slot_0": 0.5, "flam/active_units_slot_1": 0.0,
    }  # fmt: skip


@given(st.integers(0, 10_000))
def test_perplexity_is_that_of_the_histogram(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, rng.integers(1, 40), (5, 3, 4))
    meters = latent_meters(prediction(torch.zeros(5, 3, 4, 2), torch.zeros(5, 3, 4), torch.from_numpy(codes)))

    def perplexity(values: np.ndarray) -> float:
        shares = np.unique(values, return_counts=True)[1] / values.size
        return float(np.exp(-(shares * np.log(shares)).sum()))

    assert meters["flam/codebook_perplexity"].item() == pytest.approx(perplexity(codes), rel=1e-5)
    assert meters["flam/codes_used"].item() == len(np.unique(codes))
    each = [meters[f"flam/codebook_perplexity_slot_{i}"].item() for i in range(4)]
    assert each == pytest.approx([perplexity(codes[..., i]) for i in range(4)], rel=1e-5)
    assert not [key for key in meters if "kl" in key or "active" in key]


@pytest.mark.parametrize(("kind", "overlap", "largest"), [("alike", 1.0, 1 / 3), ("apart", 0.0, 0.5)])
def test_masks_are_told_by_share_and_overlap(kind: str, overlap: float, largest: float) -> None:
    masks = torch.full((2, 3, 3, 8), 1 / 3)
    if kind == "apart":
        masks = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])].T.expand(2, 3, 3, 8)
    zeros = torch.zeros(2, 2, 3, 4)
    meters = latent_meters(prediction(zeros, zeros[..., 0], masks=masks.to(torch.bfloat16)))
    assert meters["flam/slot_overlap"].item() == pytest.approx(overlap, abs=1e-3)
    assert meters["flam/largest_mask_share"].item() == pytest.approx(largest, abs=1e-2)
    assert sum(meters[f"flam/slot_share_{i}"].item() for i in range(3)) == pytest.approx(1, abs=1e-2)


def test_actions_that_are_not_the_models_own_have_no_meters() -> None:
    zeros = torch.zeros(2, 2, 3, 4)
    assert latent_meters(replace(prediction(zeros, zeros[..., 0]), prior_nll=None)) == {}


def test_the_flat_psnr_is_that_of_the_mean_colour() -> None:
    frames = torch.rand(6, 3, 8, 8)
    error = (frames - frames.mean(dim=(0, 2, 3), keepdim=True)).pow(2).mean()
    meters = tokenizer_meters(frames, torch.tensor([[1, 5, 5], [7, 1, 1]]))
    assert meters["tokenizer/flat_psnr"].item() == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert meters["tokenizer/codes_used"].item() == 3


# Small models that really train


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and on a busy machine the two wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(tokenizer_rate: float = 1e-2, beta: float = 2e-4, **model: Any) -> list[tuple[int, Finding]]:
    """The first that is found in 100 steps of the tokenizer and 100 of FLAM, on a square that jumps about."""
    settings = Config(
        recipe="test",
        tokenizer=TokenizerConfig(frame_size=16, unshuffle=4, channels=(8,), feature_dim=8),
        model=ModelConfig(
            factors=2, width=16, heads=2, blocks=1, iterations=2, temporal_window=3, latent_width=8,
            aggregator_sharpness=3.0, **model,
        ),
        tokenizer_stage=StageConfig(steps=100, batch_clips=8, clip_frames=2, learning_rate=tokenizer_rate, warmup=5),
        flam_stage=StageConfig(steps=100, batch_clips=8, clip_frames=4, learning_rate=5e-3, warmup=5),
        loss=LossConfig(beta=beta),
        precision="fp32",
    )  # fmt: skip
    corners = np.random.default_rng(0).integers(0, 2, (64, 4, 2))
    clips = torch.zeros(64, 4, 16, 16, 3, dtype=torch.uint8)
    for (clip, frame), (y, x) in zip(np.ndindex(64, 4), corners.reshape(-1, 2), strict=True):
        clips[clip, frame, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 255
    trainer, watch = Trainer(settings, torch.device("cpu")), CollapseWatch(settings)
    found: list[tuple[int, Finding]] = []
    while trainer.step < trainer.total_steps and not found:
        first, stage = trainer.step % 8 * 8, trainer.stage
        frames = clips[first : first + 8, : 2 if stage == 0 else 4]
        meters = trainer.train_step(frames, [f"clip {number}" for number in range(8)])
        if stage == 0:
            codes = trainer.model.tokenizer.codes(trainer.model.encode(frames))
            meters |= tokenizer_meters(frames.flatten(0, 1).movedim(-1, 1) / 255, codes)
        if trainer.step % 4 == 0:
            values = {key: float(value) for key, value in meters.items()}
            found += [(trainer.step, one) for one in watch.observe(trainer.step - 100 * stage, values)]
    return found


@pytest.mark.usefixtures("one_thread")
def test_a_small_model_that_learns_is_left_in_peace() -> None:
    assert trained(state="patches") == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("settings", "expected", "begins"),
    [
        ({"beta": 10.0, "initial_log_variance": -1.0}, "posterior-collapse", 100),
        ({"beta": 0.0}, "idle-actions", 100),
        ({"latent": "vq"}, "codebook-collapse", 100),
        ({"tokenizer_rate": 3.0}, "tokenizer-dead", 0),
    ],
)
def test_a_small_model_that_collapses_is_named_but_not_before_its_time(
    settings: dict[str, Any], expected: str, begins: int
) -> None:
    found = trained(**settings)
    assert [str(finding.name) for _, finding in found] == [expected]
    assert begins + 35 <= found[0][0] <= begins + 70
