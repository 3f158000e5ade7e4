"""The FLAM model."""

from flam_core.model.flam import Dynamics, Flam, Prediction
from flam_core.model.latent_action import LatentActions
from flam_core.model.tokenizer import Tokenizer

__all__ = ["Dynamics", "Flam", "LatentActions", "Prediction", "Tokenizer"]
