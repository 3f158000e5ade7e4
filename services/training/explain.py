"""What a trained model's slots have learnt to do: found, shown and kept beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flam_core.model import Flam
from flam_core.steering.discovered import DiscoveredActions, discover_actions, save_actions
from flam_core.steering.microscope import MICROSCOPE_FILE, microscope
from services.training.held_out import clips_of

if TYPE_CHECKING:
    from services.training.prepare import Prepared


@dataclass(frozen=True, eq=False)
class Explained:
    """The discovered actions of a model, and the page that shows them."""

    actions: DiscoveredActions
    page: str

    def write(self, outputs: Path) -> None:
        """Beside the report, and with the model, whose folder `outputs/model` is there already."""
        save_actions(self.actions, outputs / "model")
        for folder in (outputs, outputs / "model"):
            (folder / MICROSCOPE_FILE).write_text(self.page)


def explain(prepared: Prepared, model: Flam, metrics: Mapping[str, float]) -> Explained | None:
    """By the held-out clips that the model was evaluated on; None for a model without latent actions of its own."""
    config = prepared.config
    if config.model.latent in ("none", "true"):
        return None
    frames = config.evaluation.context + config.evaluation.horizon
    # What is broken was named when they were read for the evaluation.
    clips = clips_of(prepared.sources[0], "test", frames, config.evaluation.clips, on_broken=lambda _clip: None)
    video = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    entities = {k: int(metrics[key]) for k in range(config.model.factors) if (key := f"slots/{k}/entity") in metrics}
    actions = discover_actions(model, video, seed=config.seed, entities=entities)
    title = f"flam-{prepared.data_name}, trained by the run {prepared.run_id}"
    return Explained(actions, microscope(model, actions, video, metrics, title))
