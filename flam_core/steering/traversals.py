"""What slots do when they do one thing again and again: films for the action microscope, many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flam_core.model import Flam
from flam_core.model.places import centres
from flam_core.steering.directions import CANDIDATES, DIRECTIONS, choose, goal_of
from flam_core.steering.discovered import DiscoveredActions

STEPS = 5
_BATCH = 48
_MOST_WAYS = 8
"""Slots at most that are sent up, right, down and left: each step looks ahead."""


@dataclass(frozen=True, eq=False)
class Traversal:
    """A slot that does one thing in S scenes: a code (by its number), or one way ("up", "right", "down", "left").

    frames: uint8 [S, 1 + STEPS, H, W, 3]; the first is the scene. arrived: the share of steps that the model predicts
    to go that way; 0 for a code.
    """

    slot: int
    done: int | str
    frames: np.ndarray
    arrived: float = 0.0

    @property
    def code(self) -> int:
        """Its number, -1 for a way."""
        return self.done if isinstance(self.done, int) else -1


@torch.no_grad()
def traverse(model: Flam, discovered: DiscoveredActions, scenes: Tensor, slots: list[int]) -> list[Traversal]:
    """Every code of every slot, and the four ways of the given slots, from scenes uint8 [S, 1, H, W, 3].

    All other slots stand still, as far as they can: they do what they did when they stood where they are.
    """
    ways = [name for name, direction in DIRECTIONS.items() if any(direction)]
    asked: list[tuple[int, int | str]] = []
    for k in range(discovered.slots):
        if model.has_slots and k in slots[:_MOST_WAYS] and discovered.examples[k].stride:
            asked += [(k, way) for way in ways]
        asked += [(k, code) for code in range(len(discovered.vectors[k]))]
    count, found = len(scenes), []
    together = max(1, _BATCH // count)
    for first in range(0, len(asked), together):
        part = asked[first : first + together]
        todo = [one for one in part for _ in range(count)]
        frames, arrived = _play(model, discovered, scenes.repeat(len(part), 1, 1, 1, 1), todo)
        for i, (slot, done) in enumerate(part):
            mine = slice(i * count, (i + 1) * count)
            found.append(Traversal(slot, done, frames[mine], float(arrived[mine].mean())))
    return found


def _play(
    model: Flam, discovered: DiscoveredActions, scenes: Tensor, todo: list[tuple[int, int | str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [B, 1 + STEPS, H, W, 3] of scenes uint8 [B, 1, H, W, 3], each with what one slot does in it; and the
    share of its steps that arrive [B]."""
    batch = _Batch(model, scenes)
    frames, arrived = [scenes.cpu()], []
    for _ in range(STEPS):
        actions = _still(discovered, batch.places, len(todo))
        hits = torch.zeros(len(todo))
        for row, (slot, done) in enumerate(todo):
            if isinstance(done, int):
                actions[row, slot] = discovered.vector(slot, done)
        going = [row for row, (_, done) in enumerate(todo) if isinstance(done, str)]
        if going and batch.places is not None:
            _send(discovered, batch, todo, going, actions, hits)
        frames.append(batch.step(actions).cpu())
        arrived.append(hits)
    return torch.cat(frames, dim=1).numpy(), torch.stack(arrived).mean(dim=0).numpy()


def _still(discovered: DiscoveredActions, places: Tensor | None, count: int) -> Tensor:
    """Latent actions [B, K, A] of slots at places [B, K, 2] that stand still."""
    chosen = []
    for k in range(discovered.slots):
        if places is None or not len(discovered.examples[k].moves):
            chosen.append(discovered.vector(k, discovered.still(k)).expand(count, -1))
        else:
            examples = discovered.examples[k]
            distance = torch.cdist(places[:, k], examples.places) + examples.moves.norm(dim=-1)
            chosen.append(examples.actions[distance.argmin(dim=1)])
    return torch.stack(chosen, dim=1)


def _send(
    discovered: DiscoveredActions,
    batch: _Batch,
    todo: list[tuple[int, int | str]],
    going: list[int],
    actions: Tensor,
    hits: Tensor,
) -> None:
    """As `directions.directed`, for all rows that go a way: sets their slot's actions [B, K, A] and whether they
    arrive [B]."""
    assert batch.places is not None  # who asks has seen to it
    tried, goals = [], []
    for row in going:
        slot, way = todo[row]
        goals.append(goal_of(discovered.examples[slot], str(way)))
        candidates = actions[row].repeat(CANDIDATES, 1, 1)
        candidates[:, slot] = discovered.examples[slot].candidates(batch.places[row, slot], goals[-1])
        tried.append(candidates)
    after = batch.peek(going, torch.stack(tried))  # [rows, candidates, K, 2]
    for i, row in enumerate(going):
        slot = todo[row][0]
        best, arrives = choose(after[i, :, slot] - batch.places[row, slot], goals[i])
        actions[row, slot] = tried[i][best, slot]
        hits[row] = float(arrives)


class _Batch:
    """Scenes side by side, with feedback of frames: a `Scene` for many."""

    def __init__(self, model: Flam, scenes: Tensor) -> None:
        """scenes: uint8 [B, 1, H, W, 3]."""
        self._model, self._window = model, model.dynamics.config.temporal_window
        self._device = next(model.parameters()).device
        self._z = model.encode(scenes.to(self._device))
        config = model.dynamics.config
        self._taken = self._z.new_empty(len(scenes), 0, model.factors, config.action_dim)
        self._look()

    def _look(self) -> None:
        self._slots, _, weights = self._model.look(self._z)
        self.places = None if weights is None else centres(weights[:, -1]).cpu()
        """[B, K, 2]; None without slots."""

    def _predict(self, actions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames uint8 [N, 1, H, W, 3], features of them and of what came before, and actions taken, of some rows."""
        taken = torch.cat([self._taken[rows], actions[:, None].to(self._device)], dim=1)[:, -self._window :]
        z, slots = self._z[rows], self._slots[rows]
        drawn = self._model.decode(self._model.dynamics.step(z[:, -1], slots, taken[:, -slots.shape[1] :])[0])
        frames = (drawn * 255).round().to(torch.uint8)
        return frames, torch.cat([z, self._model.encode(frames)], dim=1)[:, -self._window :], taken

    def step(self, actions: Tensor) -> Tensor:
        """Frames uint8 [B, 1, H, W, 3] after latent actions [B, K, A]."""
        rows = torch.arange(len(actions), device=self._device)
        frames, self._z, self._taken = self._predict(actions, rows)
        self._look()
        return frames

    def peek(self, rows: list[int], actions: Tensor) -> Tensor:
        """Where slots would be, [R, N, K, 2], after N latent actions [R, N, K, A] for each of R rows."""
        count = actions.shape[1]
        every = torch.tensor(rows, device=self._device).repeat_interleave(count)
        z = self._predict(actions.flatten(0, 1), every)[1]
        weights = self._model.look(z)[2]
        assert weights is not None  # asked for models with slots alone
        return centres(weights[:, -1]).cpu().unflatten(0, (len(rows), count))
