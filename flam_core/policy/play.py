"""Playing: what a policy, the expert or chance earns in a world."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flam_core.policy.network import PolicyNetwork
from flam_core.worlds.base import Game, PlayableWorld

Player = Callable[[Sequence[Game], np.ndarray], np.ndarray]
"""The actions int64 [n] of n games, from the frames uint8 [n, stack, H, W, 3] that were seen last, the newest last."""


def expert_player(games: Sequence[Game], frames: np.ndarray) -> np.ndarray:
    """The scripted expert, without the noise of its data."""
    return np.array([game.expert() for game in games], dtype=np.int64)


def random_player(choices: int, seed: int) -> Player:
    """Each action as likely as the others."""
    rng = np.random.default_rng((seed, 2))
    return lambda games, frames: rng.integers(choices, size=len(games))


def network_player(policy: PolicyNetwork, seed: int) -> Player:
    """A policy: draws by its probabilities, or takes the most probable action if `config.greedy`."""
    device = policy.head.weight.device
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def choose(games: Sequence[Game], frames: np.ndarray) -> np.ndarray:
        logits = policy(torch.from_numpy(frames).to(device)).cpu()
        if policy.config.greedy:
            return logits.argmax(dim=1).numpy()
        return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0].numpy()

    return choose


def play_games(
    world: PlayableWorld, player: Player, *, games: int, steps: int, seed: int, stack: int = 1, at_a_time: int = 32
) -> np.ndarray:
    """Returns float64 [games]: rewards of each game, added up, on levels that were held out from the world's episodes.

    A game ends when the world says so, or after `steps` steps. `at_a_time` of them are played side by side.
    """
    returns = np.zeros(games)
    for first in range(0, games, at_a_time):
        numbers = range(first, min(games, first + at_a_time))
        playing = {number: world.play((seed, number), held_out=True) for number in numbers}
        seen = {number: [game.frame()] * stack for number, game in playing.items()}
        try:
            for _ in range(steps):
                if not playing:
                    break
                frames = np.stack([np.stack(seen[number]) for number in playing])
                actions = player(list(playing.values()), frames)
                for number, action in zip(list(playing), actions.tolist(), strict=True):
                    reward, ended = playing[number].act(action)
                    returns[number] += reward
                    if ended:
                        playing.pop(number).close()
                    else:
                        seen[number] = [*seen[number][1:], playing[number].frame()]
        finally:
            for game in playing.values():
                game.close()
    return returns
