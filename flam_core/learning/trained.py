"""What a training has come to so far, as a model."""

from __future__ import annotations

import safetensors.torch

from flam_core.learning.state import TrainState
from flam_core.model import Flam
from flam_core.saved_model import weights_from_bytes


def load_trained(model: Flam, state: TrainState) -> None:
    """Give a model what the training so far gives: weights, or their running mean. Raises DataError if they do not fit
    the model or are damaged."""
    weights_from_bytes(model, state.model)
    if state.mean is not None:
        part = model.tokenizer if state.meta["stage"] == 0 else model.dynamics
        part.load_state_dict(safetensors.torch.load(state.mean), strict=False)
