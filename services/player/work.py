"""What the process that answers HTTP hands to those with a model. It has no torch, and must not wait for its import."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.player.settings import Feedback
from services.player.wire import Put


@dataclass(frozen=True, eq=False)
class ToRoll:
    """Known frames uint8 [t, H, W, 3] and latent actions float32 [t - 1 + S, K, A]."""

    frames: np.ndarray
    actions: np.ndarray
    feedback: Feedback


@dataclass(frozen=True, eq=False)
class ToEdit:
    """A clip uint8 [T, H, W, 3], and what a slot of it is to do."""

    frames: np.ndarray
    slot: int
    put: Put
    feedback: Feedback
