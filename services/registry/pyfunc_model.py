"""The code that MLflow runs for a registered model ("models from code"): nothing of it is ever pickled.

Input: `frames`, uint8 video [N, T, H, W, 3]. Output: what the model predicts for frames 1 .. T - 1 of each clip when it
is given the first frame and the latent actions inferred from the rest, uint8 [N, T - 1, H, W, 3].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

import flam_core
from flam_core.model import Flam


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
        """See the module's docstring. `model_input`: the array, or a dict with it under `frames`."""
        # MLflow puts the array under the name that the signature gives it.
        video = model_input["frames"] if isinstance(model_input, dict) else model_input
        frames = torch.from_numpy(np.ascontiguousarray(video))
        actions = self.model.infer_actions(self.model.slots(self.model.encode(frames))[0])
        predicted = self.model.rollout(frames[:, :1], actions)
        return predicted.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


set_model(FlamPyfunc())
