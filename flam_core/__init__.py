"""FLAM: factored latent action world models.

import flam_core
model = flam_core.load("models:/flam-grid/1")     # or a folder
z = model.encode(frames)                          # uint8 [B, T, H, W, 3]
slots, masks = model.slots(z)
actions = model.infer_actions(slots)
future = model.rollout(frames[:, :1], actions)    # [B, T - 1, H, W, 3] in [0, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flam_core.saved_model import load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    # Deferred: processes that only read data (Ray Data tasks) must not pay for importing torch.
    if name == "load":
        from importlib import import_module

        return import_module("flam_core.saved_model").load
    raise AttributeError(f"module 'flam_core' has no attribute {name!r}")
