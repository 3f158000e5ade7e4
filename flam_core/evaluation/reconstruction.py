"""How well a tokenizer alone gives held-out frames back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flam_core.errors import DataError
from flam_core.evaluation.context import BATCH, HeldOutClip
from flam_core.evaluation.image import frame_mse, frame_ssim, psnr
from flam_core.evaluation.measure import Findings
from flam_core.evaluation.pictures import reconstruction_png
from flam_core.evaluation.stats import Bootstrap
from flam_core.model.tokenizer import Tokenizer


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: Tokenizer, clips: Sequence[HeldOutClip], seed: int) -> tuple[Findings, bytes]:
    """`ceiling/psnr`, `ceiling/ssim`, `tokenizer/perplexity` of frames of clips of equal length, and a picture (PNG).

    The tokenizer should be in evaluation mode. Raises DataError without clips.
    """
    if not clips:
        raise DataError("there are no held-out clips to measure the tokenizer on", fix="Ingest more episodes.")
    device = next(tokenizer.parameters()).device
    mse, ssim, used, shown = [], [], [], []
    for start in range(0, len(clips), BATCH):
        frames = torch.from_numpy(np.stack([clip.frames for clip in clips[start : start + BATCH]])).to(device)
        z = tokenizer.encode(frames)
        drawn, truth = tokenizer.decode(z).float().clamp(0, 1), frames.float() / 255
        mse.append(frame_mse(drawn, truth).cpu().double().numpy())
        ssim.append(frame_ssim(drawn, truth).cpu().double().numpy())
        codes = tokenizer.codes(z).flatten(1).cpu()
        used.append(torch.stack([row.bincount(minlength=tokenizer.config.codes) for row in codes]).double().numpy())
        shown.append((drawn[:, 0] * 255).round().to(torch.uint8).cpu().numpy())
    bootstrap = Bootstrap([clip.episode for clip in clips], seed)
    counts = bootstrap.total(np.concatenate(used))
    shares = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    estimates = {
        "ceiling/psnr": bootstrap.estimate(psnr(bootstrap.ratio(np.concatenate(mse).mean(axis=1)))),
        "ceiling/ssim": bootstrap.estimate(bootstrap.ratio(np.concatenate(ssim).mean(axis=1))),
        "tokenizer/perplexity": bootstrap.estimate(np.exp(entropy)),
    }
    return Findings(estimates), reconstruction_png(np.stack([clip.frames[0] for clip in clips]), np.concatenate(shown))
