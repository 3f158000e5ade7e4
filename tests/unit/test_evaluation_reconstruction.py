"""A tokenizer alone: how well it gives frames back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flam_core.errors import DataError
from flam_core.evaluation.reconstruction import evaluate_tokenizer
from tests.evaluation_fixture import grid_clips, small_flam


def test_a_tokenizer_is_measured_on_whole_clips() -> None:
    tokenizer = small_flam().tokenizer
    clips = grid_clips(6, 1)
    found, picture = evaluate_tokenizer(tokenizer, clips, 0)
    assert set(found.estimates) == {"ceiling/psnr", "ceiling/ssim", "tokenizer/perplexity"}
    frames = np.stack([clip.frames for clip in clips])
    drawn = tokenizer.decode(tokenizer.encode(torch.from_numpy(frames))).clamp(0, 1).detach().numpy()
    mse = np.square(drawn - frames / 255).mean()
    assert found.metrics["ceiling/psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    assert 1 <= found.metrics["tokenizer/perplexity"] <= tokenizer.config.codes
    assert Image.open(io.BytesIO(picture)).width > 300


def test_without_clips_it_says_so() -> None:
    with pytest.raises(DataError, match="no held-out clips"):
        evaluate_tokenizer(small_flam().tokenizer, [], 0)
