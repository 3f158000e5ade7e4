"""The FLAM model."""

from flam_core.model.flam import Dynamics, Flam
from flam_core.model.latent_action import LatentActions
from flam_core.model.patches import PatchDynamics
from flam_core.model.prediction import Prediction
from flam_core.model.tokenizer import Tokenizer

__all__ = ["Dynamics", "Flam", "LatentActions", "PatchDynamics", "Prediction", "Tokenizer"]
