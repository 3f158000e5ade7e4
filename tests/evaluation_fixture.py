"""Stand-ins for models whose measures are known beforehand, and clips to measure them on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.config_evaluation import EvaluationConfig
from flam_core.evaluation.context import Context, HeldOutClip
from flam_core.model.flam import Flam
from flam_core.model.latent_action import LatentActions
from flam_core.worlds.grid import GridWorld

CONFIG = EvaluationConfig(
    clips=6, horizon=3, context=1, probe_clips=6, long_clips=4, long_horizon=5, replacement="prior"
)
"""Small. A model with random weights infers about the same from all clips, so samples replace its latent actions."""


def latent_of(actions: Tensor) -> LatentActions:
    """Actions [B, T - 1, K, A] that a stand-in infers: a nat each."""
    return LatentActions(actions, actions, torch.ones_like(actions[..., 0]))


class Oracle(nn.Module):
    """Stands in for Flam: its slots are the pixels and its latent action is the next frame, which it then predicts."""

    has_slots = True

    def __init__(self, factors: int = 2, offset: float = 0.0, latent: str = "gaussian") -> None:
        super().__init__()
        self.factors, self.offset = factors, offset
        self.anchor = nn.Parameter(torch.zeros(()))
        self.size: tuple[int, ...] = ()
        config = ModelConfig(factors=factors, width=8, heads=1, latent_width=2 * factors)
        self.dynamics = SimpleNamespace(config=SimpleNamespace(latent=latent, temporal_window=config.temporal_window))

    def encode(self, frames_u8: Tensor) -> Tensor:
        self.size = tuple(frames_u8.shape[2:])
        return (frames_u8.float() / 255).flatten(2, 3)

    def decode(self, z: Tensor) -> Tensor:
        return z.reshape(*z.shape[:2], *self.size)

    def slots(self, z: Tensor) -> tuple[Tensor, Tensor]:
        slots = z.flatten(2)[:, :, None].expand(-1, -1, self.factors, -1)
        return slots, torch.full((*z.shape[:2], self.factors, z.shape[2]), 1 / self.factors)

    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        return latent_of(slots[:, 1:])

    def sample_actions(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(*shape, int(np.prod(self.size)), generator=generator)

    def imagine(
        self, frames_u8: Tensor, steps: int, generator: torch.Generator | None = None, feedback: str = "slots"
    ) -> tuple[Tensor, Tensor]:
        actions = self.sample_actions((len(frames_u8), frames_u8.shape[1] - 1 + steps, self.factors), generator)
        return self.rollout(frames_u8, actions), actions

    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: str = "slots") -> Tensor:
        known = frames_u8.shape[1] - 1
        return self.decode(actions[:, known:, 0]) + self.offset


class Copier(Oracle):
    """Predicts that nothing happens."""

    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: str = "slots") -> Tensor:
        return (frames_u8[:, -1:].float() / 255).expand(-1, actions.shape[1] - frames_u8.shape[1] + 1, -1, -1, -1)


CELLS, PIXELS = 8, 4
"""Cells along a side of the puppets' stage, and pixels along a cell's."""


class Puppets(nn.Module):
    """Stands in for Flam on `puppet_clips`: slot i is the cell of the puppet of colour i, its latent action how far
    that moves.

    What is empty falls to the last slot. leak: "none": an action moves its own puppet. "led": the first one's moves
    all. "swap": it moves the next puppet instead of its own.
    """

    has_slots = True

    def __init__(self, factors: int = 2, leak: str = "none") -> None:
        super().__init__()
        self.factors, self.leak = factors, leak
        self.anchor = nn.Parameter(torch.zeros(()))
        self.dynamics = SimpleNamespace(config=SimpleNamespace(latent="gaussian", temporal_window=3))

    def encode(self, frames_u8: Tensor) -> Tensor:
        b, t = frames_u8.shape[:2]
        cells = frames_u8.float().reshape(b, t, CELLS, PIXELS, CELLS, PIXELS, 3).mean(dim=(3, 5)) / 255
        return cells.flatten(2, 3)

    def decode(self, z: Tensor) -> Tensor:
        square = z.unflatten(2, (CELLS, CELLS))
        return square.repeat_interleave(PIXELS, dim=2).repeat_interleave(PIXELS, dim=3)

    def slots(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        colours = z[..., : self.factors].transpose(2, 3)  # [B, T, K, P]
        masks = colours + 1e-3 * torch.arange(1, self.factors + 1)[:, None]
        return self._places(z), masks / masks.sum(dim=2, keepdim=True)

    def _places(self, z: Tensor) -> Tensor:
        """Columns and rows [B, T, K, 2]."""
        cell = z[..., : self.factors].argmax(dim=2)
        return torch.stack([cell % CELLS, cell // CELLS], dim=-1).float()

    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        return latent_of(slots.diff(dim=1))

    def sample_actions(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(-1, 2, (*shape, 2), generator=generator).float()

    def imagine(
        self, frames_u8: Tensor, steps: int, generator: torch.Generator | None = None, feedback: str = "slots"
    ) -> tuple[Tensor, Tensor]:
        actions = self.sample_actions((len(frames_u8), frames_u8.shape[1] - 1 + steps, self.factors), generator)
        return self.rollout(frames_u8, actions), actions

    def rollout(self, frames_u8: Tensor, actions: Tensor, feedback: str = "slots") -> Tensor:
        place = self._places(self.encode(frames_u8))[:, -1]
        frames = []
        for t in range(frames_u8.shape[1] - 1, actions.shape[1]):
            told = actions[:, t]
            place = place + {"none": told, "swap": told.roll(1, dims=1), "led": told[:, :1]}[self.leak]
            frames.append(self._draw(place))
        return self.decode(torch.stack(frames, dim=1))

    def _draw(self, place: Tensor) -> Tensor:
        """Patches [B, P, 3] with the first two puppets at cells [B, K, 2]; what is off the stage is not seen."""
        z = torch.zeros(len(place), CELLS, CELLS, 3)
        for i in range(2):
            column, row = place[:, i].long().unbind(dim=-1)
            on = (column >= 0) & (column < CELLS) & (row >= 0) & (row < CELLS)
            z[on.nonzero()[:, 0], row[on], column[on], i] = 1.0
        return z.flatten(1, 2)


class PatchPuppets(Puppets):
    """The same without slots."""

    has_slots = False

    def slots(self, z: Tensor) -> tuple[Tensor, None]:
        return z, None

    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        return latent_of(self._places(slots).diff(dim=1))


MOVES = np.array([(0, 0), (0, -1), (1, 0), (0, 1), (-1, 0)])
"""Columns and rows by which a puppet goes when told 0 .. 4."""


def puppet_clips(count: int, frames: int = 6, seed: int = 0, truth: bool = True) -> list[HeldOutClip]:
    """Two puppets, red and green, that each keep to an area of their own, 2 cells by 6, and never come close. One that
    is told to leave it stays where it is. Two clips an episode."""
    rng = np.random.default_rng(seed)
    least, most = np.array([[1, 1], [5, 1]]), np.array([[2, 6], [6, 6]])
    clips = []
    for n in range(count):
        at = rng.integers(least, most + 1)
        told = rng.integers(len(MOVES), size=(frames, 2))
        film = np.zeros((frames, CELLS, CELLS, 3), dtype=np.uint8)
        places = np.empty((frames, 2, 2), dtype=np.float32)
        for t in range(frames):
            places[t] = (at + 0.5) / CELLS
            for i in range(2):
                film[t, at[i, 1], at[i, 0], i] = 255
            there = at + MOVES[told[t]]
            at = np.where(((there >= least) & (there <= most)).all(axis=1, keepdims=True), there, at)
        film = film.repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
        known = (places, told[..., None].astype(np.float32)) if truth else (None, None)
        clips.append(HeldOutClip(f"{seed}-{n}", f"{seed}-{n // 2}", film, *known))
    return clips


def stub(kind: type[nn.Module], **options: Any) -> Flam:
    """A stand-in, typed as what it stands in for."""
    return cast(Flam, kind(**options))


def noise(clips: int = 6, frames: int = 4, seed: int = 0) -> Tensor:
    """Random frames uint8 [clips, frames, 16, 16, 3]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=(clips, frames, 16, 16, 3), dtype=np.uint8))


def filmed(frames_u8: Tensor) -> list[HeldOutClip]:
    """Clips of frames uint8 [N, T, H, W, 3], each of an episode of its own, without ground truth."""
    return [HeldOutClip(f"clip-{i}", f"episode-{i}", frames) for i, frames in enumerate(frames_u8.numpy())]


def context(
    model: Flam, frames_u8: Tensor, config: EvaluationConfig = CONFIG, seed: int = 0, train: Tensor | None = None
) -> Context:
    """To roll out all clips uint8 [N, T, H, W, 3]; `train` is for the mean frame."""
    return Context(model, filmed(frames_u8), [] if train is None else filmed(train), [], config, seed)


def small_flam(factors: int = 3, **options: Any) -> Flam:
    """A real model with random weights, so strong that its latent actions change the picture."""
    torch.manual_seed(0)
    model = Flam(
        TokenizerConfig(frame_size=48, unshuffle=4, channels=(16,), feature_dim=16),
        ModelConfig(factors=factors, width=32, heads=4, latent_width=24, **options),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("out.1.weight", "action.2.weight", "inverse.latent.head.weight")):
                weight.mul_(30)
    return model


def grid_clips(count: int, seed: int, frames: int = 5, truth: bool = True) -> list[HeldOutClip]:
    """Clips of the built-in grid world."""
    world = GridWorld(agents=2, cells=6, walls=2, frame_size=48)
    return [
        HeldOutClip(
            f"clip-{e}",
            f"episode-{e}",
            episode.frames,
            episode.positions if truth else None,
            episode.actions if truth else None,
        )
        for e, episode in enumerate(world.episodes(count, frames, seed))
    ]
