"""Policies from videos: latent actions label what few true actions explain, then behaviour is cloned."""

from flam_core.policy.cloning import clone, top_actions
from flam_core.policy.config import PolicyConfig
from flam_core.policy.decoder import ActionDecoder, fit_decoder
from flam_core.policy.demonstrations import Demonstrations
from flam_core.policy.latents import infer_latents
from flam_core.policy.network import PolicyNetwork
from flam_core.policy.play import expert_player, network_player, play_games, random_player

__all__ = [
    "ActionDecoder",
    "Demonstrations",
    "PolicyConfig",
    "PolicyNetwork",
    "clone",
    "expert_player",
    "fit_decoder",
    "infer_latents",
    "network_player",
    "play_games",
    "random_player",
    "top_actions",
]
