"""Arrow keys: the latent action that moves a slot up, right, down or left from where it stands.

A continuous latent action may say from where its entity goes as well as which way: then no single vector means
"up" everywhere. So what a slot did from places near by is looked up, and of the candidates that is taken which the
model itself predicts to go the right way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flam_core.errors import SettingsError
from flam_core.steering.scene import Scene

DIRECTIONS = {"up": (0.0, -1.0), "right": (1.0, 0.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "still": (0.0, 0.0)}
_ALIKE, _ARRIVING, _STILL = 3, 3, 2
CANDIDATES = _ALIKE + _ARRIVING + _STILL
"""Actions that are tried at each step."""
ARRIVED = 0.5
"""A step goes the way that was asked for if it ends nearer to its goal than this share of a stride."""
LEAST = 0.05
"""Share of the frame's side that stillness may be off by, over ARRIVED."""


@dataclass(frozen=True, eq=False)
class Examples:
    """M transitions of a slot: where it was (`places.centres`), float32 [M, 2], how it moved, [M, 2], and the latent
    actions [M, A]. Places and moves are (x, y) in shares of the frame's side, y down."""

    places: Tensor
    moves: Tensor
    actions: Tensor

    @property
    def stride(self) -> float:
        """How far the slot goes when it goes: the median of what is not stillness; 0 if it never moves."""
        lengths = self.moves.norm(dim=-1)
        going = lengths[lengths > 0.3 * lengths.max()] if len(lengths) else lengths
        return float(going.median()) if len(going) else 0.0

    def near(self, place: Tensor, move: Tensor, count: int) -> Tensor:
        """Actions [n, A] of the up to `count` transitions that are nearest to a place [2] and a move [2]."""
        distance = (self.places - place).norm(dim=-1) + (self.moves - move).norm(dim=-1)
        return self.actions[distance.argsort(stable=True)[:count]]

    def candidates(self, place: Tensor, move: Tensor) -> Tensor:
        """Actions [CANDIDATES, A] that may make a move [2] from a place [2]: of transitions like it; of those that come
        to the same place, from wherever, since that is what an action may stand for; and of stillness there."""
        arriving = (self.places + self.moves - place - move).norm(dim=-1)
        found = [
            self.near(place, move, _ALIKE),
            self.actions[arriving.argsort(stable=True)[:_ARRIVING]],
            self.near(place, torch.zeros(2), _STILL),
        ]
        return torch.cat(found)[torch.arange(CANDIDATES) % sum(map(len, found))]


@dataclass(frozen=True, eq=False)
class Directed:
    """A latent action float32 [A]; the move (dx, dy) that the model predicts for it; whether it goes as was asked."""

    action: Tensor
    move: Tensor
    arrives: bool


def directed(scene: Scene, slot: int, direction: str, examples: Examples, others: Tensor) -> Directed:
    """The latent action that best moves `slot` in a direction of DIRECTIONS from where it stands.

    examples: of that slot. others: latent actions float32 [K, A] of all slots for this step, of which the slot's own
    does not count. It takes one look ahead (`Scene.peek`) and no step. Raises SettingsError for an unknown direction
    and for a model without slots.
    """
    if direction not in DIRECTIONS:
        raise SettingsError(f"direction {direction!r}", fix=f"Use one of {', '.join(DIRECTIONS)}.")
    if (places := scene.places) is None:
        raise SettingsError("a model without slots has none that could go anywhere", fix="Use one with slots.")
    place = places[slot]
    found = _distinct(examples.candidates(place, goal_of(examples, direction)))
    actions = others.cpu().float().repeat(len(found), 1, 1)
    actions[:, slot] = found
    after = scene.peek(actions)[1]
    assert after is not None  # it has slots
    moves = after[:, slot] - place
    best, arrives = choose(moves, goal_of(examples, direction))
    return Directed(found[best], moves[best], arrives)


def _distinct(actions: Tensor) -> Tensor:
    """Actions [n, A] each once, in order: what is like the move and what comes to the same place is often the same
    transition, and each is looked ahead for."""
    return torch.tensor(list(dict.fromkeys(map(tuple, actions.tolist()))))


def goal_of(examples: Examples, direction: str) -> Tensor:
    """The move [2] of one stride in a direction."""
    return examples.stride * torch.tensor(DIRECTIONS[direction])


def choose(moves: Tensor, goal: Tensor) -> tuple[int, bool]:
    """Which of the moves [N, 2] to take for a goal [2], and whether it gets there. If none does, the least move."""
    off = (moves - goal).norm(dim=-1)
    best = int(off.argmin())
    arrives = bool(off[best] <= ARRIVED * goal.norm().clamp_min(LEAST))
    return (best if arrives else int(moves.norm(dim=-1).argmin())), arrives
