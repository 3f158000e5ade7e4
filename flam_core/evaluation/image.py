"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PSNR_CAP = 100.0
"""dB; a prediction without any error has no finite PSNR, and JSON has no infinity."""


def psnr(mse: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, at most PSNR_CAP, of mean squared errors of values in [0, 1]."""
    return -10 * np.log10(np.maximum(mse, 10 ** (-PSNR_CAP / 10)))


def frame_mse(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error [B, S] of frames float [B, S, H, W, 3]."""
    return (prediction - truth).square().mean(dim=(2, 3, 4))


def frame_ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """SSIM [B, S] of frames float [B, S, H, W, 3] in [0, 1] (Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5)."""
    # A second, and matplotlib with it; the driver of a run imports this module and never measures anything.
    from torchmetrics.functional.image import structural_similarity_index_measure

    b, s = truth.shape[:2]
    x, y = (frames.flatten(0, 1).permute(0, 3, 1, 2).contiguous() for frames in (prediction, truth))
    values = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    return torch.as_tensor(values).reshape(b, s)
