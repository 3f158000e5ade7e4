"""The code that MLflow runs for a registered model ("models from code"): nothing of it is ever pickled.

Input: `frames`, uint8 video [N, T, H, W, 3]. What comes out is for the parameter `mode` to say:

    predict  (default) frames 1 .. T - 1 as the model predicts them from the first and the latent actions inferred from
             the rest: uint8 [N, T - 1, H, W, 3]
    infer    those latent actions: float32 [N, T - 1, K, A]
    edit     as predict, with the actions of `slot` drawn from the learned prior (`seed`): uint8 [N, T - 1, H, W, 3]
    free     `steps` frames that follow the clip, all actions drawn from the learned prior: uint8 [N, steps, H, W, 3]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

import flam_core
from flam_core.errors import SettingsError
from flam_core.model import Flam

MODES = ("predict", "infer", "edit", "free")


class FlamPyfunc(PythonModel):
    """Flam behind MLflow's predict."""

    model: Flam

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights that lie beside this file in the registered model."""
        self.model = flam_core.load(Path(context.artifacts["flam"]))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - the stub says None
        self,
        context: PythonModelContext,
        model_input,  # noqa: ANN001 - MLflow would take a type here for its schema, and warn that it is none it knows
        params: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """See the module's docstring. `model_input`: the array, or a dict with it under `frames`. Raises SettingsError
        for an unknown mode or slot."""
        # MLflow puts the array under the name that the signature gives it.
        video = model_input["frames"] if isinstance(model_input, dict) else model_input
        frames = torch.from_numpy(np.ascontiguousarray(video))
        asked = {"mode": "predict", "slot": 0, "steps": 10, "seed": 0, **(params or {})}
        mode, generator = asked["mode"], torch.Generator().manual_seed(int(asked["seed"]))
        if mode not in MODES:
            raise SettingsError(f"mode {mode!r}", fix=f"Use one of {', '.join(MODES)}.")
        if mode == "free":
            return _bytes(self.model.imagine(frames, int(asked["steps"]), generator)[0])
        actions = self.model.infer_actions(self.model.slots(self.model.encode(frames))[0])
        if mode == "infer":
            return actions.float().numpy()
        if mode == "edit":
            slot = int(asked["slot"])
            if not 0 <= slot < self.model.factors:
                raise SettingsError(f"slot {slot}", fix=f"The model has slots 0 to {self.model.factors - 1}.")
            drawn = self.model.imagine(frames[:, :1], actions.shape[1], generator)[1]
            actions[:, :, slot] = drawn[:, :, slot]
        return _bytes(self.model.rollout(frames[:, :1], actions))


def _bytes(frames: torch.Tensor) -> np.ndarray:
    return frames.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


set_model(FlamPyfunc())
