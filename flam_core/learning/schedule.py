"""Learning rate over the steps of a stage, and the precision of the forward pass."""

from __future__ import annotations

import math
from typing import Literal

import torch

from flam_core.config import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine to zero. `step` counts from 0 within the stage."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    return stage.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / stage.steps))


def autocast_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for fp32. "auto" takes bf16 only where it is fast in hardware."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
