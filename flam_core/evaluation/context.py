"""What measures share: held-out clips and what the model makes of them, worked out once and when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from flam_core.config_evaluation import EvaluationConfig
from flam_core.errors import DataError
from flam_core.evaluation.stats import Bootstrap
from flam_core.model.flam import Flam

ResultT = TypeVar("ResultT")
Need = Literal["positions", "actions", "latent actions", "slots"]
"""Ground truth of the clips (positions; actions), and parts of the model (latent actions of its own; slots)."""

BATCH = 16
"""Clips that go through the model at a time."""


@dataclass(frozen=True, eq=False)
class HeldOutClip:
    """A clip that the model was not trained on (but for the probes' train split), with what is known of it.

    frames: uint8 [T, H, W, 3], RGB. positions: float32 [T, A, 2], (x, y) in [0, 1] of the frame, NaN while an entity is
    not in view. actions: float32 [T, A, width], what each entity was told to do. None where there is no ground truth.
    """

    id: str
    episode: str
    frames: np.ndarray
    positions: np.ndarray | None = None
    actions: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Observed:
    """N clips of T frames, and what the model sees in them. On the CPU.

    frames: uint8 [N, T, H, W, 3]. slots: float32 [N, T, K, D]; of a model without slots the mean over patches of its
    features, [N, T, 1, C]. masks: float32 [N, T, K, P], or None without slots. actions: the inferred latent actions
    float32 [N, T - 1, M, A]. penalty, codes: of each, [N, T - 1, M], as in `LatentActions`. positions, true_actions:
    [N, T, E, 2] and [N, T, E, width], None unless all clips have them.
    """

    clips: tuple[HeldOutClip, ...]
    frames: Tensor
    slots: Tensor
    masks: Tensor | None
    actions: Tensor
    penalty: Tensor
    codes: Tensor | None
    positions: np.ndarray | None
    true_actions: np.ndarray | None

    @property
    def clusters(self) -> list[str]:
        """Of each clip, what is resampled as a whole for standard errors: its episode.

        Where all are of one episode, the clip itself: else there would be nothing to resample.
        """
        episodes = [clip.episode for clip in self.clips]
        return episodes if len(set(episodes)) > 1 else [clip.id for clip in self.clips]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A clip's part of `Observed`."""

    slots: Tensor
    masks: Tensor | None
    actions: Tensor
    penalty: Tensor
    codes: Tensor | None


class Context:
    """A model and the clips to measure it on. The model should be in evaluation mode while measures run.

    clips: of which the first `config.clips` that have `frames` frames are rolled out. probe_train, probe_test: of which
    the first `config.probe_clips` that are as long and have the ground truth in question are probed. long_clips: for
    the long rollout. All may overlap, and what the model makes of a clip is worked out once.
    """

    def __init__(
        self,
        model: Flam,
        clips: Sequence[HeldOutClip],
        probe_train: Sequence[HeldOutClip],
        probe_test: Sequence[HeldOutClip],
        config: EvaluationConfig,
        seed: int,
        long_clips: Sequence[HeldOutClip] = (),
    ) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.clips = tuple(clips)
        self.long_clips = tuple(long_clips) or self.clips
        self._probes = {"train": tuple(probe_train), "test": tuple(probe_test)}
        self._cuts: dict[tuple[HeldOutClip, int], HeldOutClip] = {}
        self._seen: dict[HeldOutClip, _Seen] = {}
        self._shared: dict[Callable[[Context], Any], Any] = {}

    @property
    def frames(self) -> int:
        """Frames of a clip that most measures use: context and horizon."""
        return self.config.context + self.config.horizon

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    @property
    def latent(self) -> str:
        """Kind of the model's latent actions: gaussian, vq, none or true."""
        return self.model.dynamics.config.latent

    @cached_property
    def held_out(self) -> Observed:
        """The clips that are rolled out. Raises DataError if no clip, or only one, is long enough."""
        usable = self.cut(self.clips, self.frames)[: self.config.clips]
        if not usable:
            found = ", ".join(str(n) for n in sorted({len(clip.frames) for clip in self.clips})) or "no clips at all"
            raise DataError(
                f"no clip has the {self.frames} frames of context {self.config.context} + horizon "
                f"{self.config.horizon}; lengths: {found}",
                fix="Lower evaluation.horizon, or ingest longer clips.",
            )
        if len(usable) < 2:
            raise DataError(
                "evaluation has 1 clip, and the control needs another clip's latent actions", fix="Give at least 2."
            )
        return self.observe(usable)

    def probes(self, split: str, truth: str) -> Observed:
        """The clips of a probe split ("train", "test") that have a ground truth ("positions", "actions").

        Raises DataError if there are none, or they differ in the number of entities.
        """
        known = [clip for clip in self.cut(self._probes[split], self.frames) if getattr(clip, truth) is not None]
        known = known[: self.config.probe_clips]
        if not known:
            what = "ground-truth positions" if truth == "positions" else "true actions"
            raise DataError(f"no {split} clip has {what} and {self.frames} frames", fix="Ingest ground truth.")
        if len(entities := {getattr(clip, truth).shape[1] for clip in known}) > 1:
            raise DataError(
                f"{split} clips have different numbers of entities: {sorted(entities)}",
                fix="Probe one data set at a time.",
            )
        return self.observe(known)

    def shared(self, make: Callable[[Context], ResultT]) -> ResultT:
        """`make(self)`, worked out once, however many measures ask for it."""
        if make not in self._shared:
            self._shared[make] = make(self)
        return cast(ResultT, self._shared[make])

    def lacks(self, need: Need) -> str | None:
        """Why the model or the probes' clips lack what a measure needs; None if they have it."""
        if need == "slots" and not self.model.has_slots:
            return "the model has no slots"
        if need == "latent actions" and self.latent in ("none", "true"):
            return "the model has no latent actions of its own"
        if need in ("positions", "actions"):
            try:
                self.probes("train", need)
                self.probes("test", need)
            except DataError as error:
                return error.what
        return None

    @cached_property
    def mean_frame(self) -> np.ndarray | None:
        """The mean float64 [H, W, 3] in [0, 1] of all frames of the probes' train clips; None if there are none."""
        clips = self._probes["train"][: self.config.probe_clips]
        if not clips:
            return None
        total = sum(clip.frames.sum(axis=0, dtype=np.float64) for clip in clips)
        return np.asarray(total) / (255 * sum(len(clip.frames) for clip in clips))

    def cut(self, clips: Sequence[HeldOutClip], frames: int) -> list[HeldOutClip]:
        """The clips that have so many frames, cut to them. Equal calls give the same objects."""
        return [self._cut(clip, frames) for clip in clips if len(clip.frames) >= frames]

    def _cut(self, clip: HeldOutClip, frames: int) -> HeldOutClip:
        if len(clip.frames) == frames:
            return clip
        if (clip, frames) not in self._cuts:
            positions, actions = (None if x is None else x[:frames] for x in (clip.positions, clip.actions))
            short = replace(clip, frames=clip.frames[:frames], positions=positions, actions=actions)
            self._cuts[clip, frames] = short
        return self._cuts[clip, frames]

    def observe(self, clips: Sequence[HeldOutClip]) -> Observed:
        """What the model makes of clips of equal length.

        Raises DataError if the model needs true actions and a clip has none.
        """
        fresh = [clip for clip in dict.fromkeys(clips) if clip not in self._seen]
        for start in range(0, len(fresh), BATCH):
            self._look(fresh[start : start + BATCH])
        seen = [self._seen[clip] for clip in clips]
        masks = [one.masks for one in seen if one.masks is not None]
        codes = [one.codes for one in seen if one.codes is not None]
        return Observed(
            clips=tuple(clips),
            frames=torch.from_numpy(np.stack([clip.frames for clip in clips])),
            slots=torch.stack([one.slots for one in seen]),
            masks=torch.stack(masks) if masks else None,
            actions=torch.stack([one.actions for one in seen]),
            penalty=torch.stack([one.penalty for one in seen]),
            codes=torch.stack(codes) if codes else None,
            positions=_stacked([clip.positions for clip in clips]),
            true_actions=_stacked([clip.actions for clip in clips]),
        )

    def _look(self, clips: Sequence[HeldOutClip]) -> None:
        true_actions = None
        if self.latent == "true":
            if without := [clip.id for clip in clips if clip.actions is None]:
                raise DataError(
                    f"clip {without[0]} has no true actions, and this model predicts from them",
                    fix="Ingest ground truth, or evaluate another model.",
                )
            stacked = np.stack([clip.actions for clip in clips if clip.actions is not None])
            true_actions = torch.from_numpy(stacked).to(self.device)
        frames = torch.from_numpy(np.stack([clip.frames for clip in clips])).to(self.device)
        state, masks = self.model.slots(self.model.encode(frames))
        latent = self.model.infer(state, true_actions)
        actions, penalty = latent.mean.float().cpu(), latent.penalty.float().cpu()
        codes = None if latent.codes is None else latent.codes.cpu()
        slots = (state.mean(dim=2, keepdim=True) if masks is None else state).float().cpu()
        masks = None if masks is None else masks.float().cpu()
        for i, clip in enumerate(clips):
            mask, code = (None if values is None else values[i] for values in (masks, codes))
            self._seen[clip] = _Seen(slots[i], mask, actions[i], penalty[i], code)

    def bootstrap(self, clusters: Sequence[str]) -> Bootstrap:
        """Resamples of the clusters, the same for all measures of the same clips."""
        return Bootstrap(clusters, self.seed)

    def rng(self, stream: int) -> np.random.Generator:
        """A generator of its own for each stream."""
        return np.random.default_rng((self.seed, stream))

    def generator(self, stream: int) -> torch.Generator:
        """As `rng`, for torch, on the CPU."""
        return torch.Generator().manual_seed(int(self.rng(stream).integers(2**62)))


def derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation int64 [count] that moves everything, count >= 2: one random cycle through all."""
    order = rng.permutation(count)
    moved = np.empty(count, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def _stacked(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """One array, or None if one is missing or entities differ in number."""
    known = [array for array in arrays if array is not None]
    if len(known) < len(arrays) or len({array.shape for array in known}) > 1:
        return None
    return np.stack(known)
