"""What a run needs to go on. No torch here: who only looks after checkpoints need not load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on, but for its config."""

    model: bytes
    """safetensors."""
    optimizer: bytes
    """PyTorch's format, tensors and plain values alone."""
    mean: bytes | None
    """safetensors: the running mean of the weights of the module in training, if there is one."""
    meta: dict[str, Any]
    """Plain JSON values: `step`, `stage`, `consumed` and, with a mean, `mean_steps`."""
