"""What the feed reads for each step: a pure function of the plan, so any process can compute any part of it.

This module and `read` run in Ray Data tasks: they import neither torch nor Ray, which keeps the tasks quick to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from flam_core.data.codec import get_codec
from flam_core.data.manifest import Manifest
from flam_core.data.mixture import Mixture, shares
from flam_core.data.order import Block, ClipKey, SampleOrder, Window, WindowShape, rank_slice
from flam_core.data.quarantine import Quarantine
from flam_core.errors import SettingsError
from services.storage import Location

_CHUNK_BYTES = 32 << 20
_CHUNK_STEPS = 1024

Decode = Literal["auto", "worker", "task"]


@dataclass(frozen=True)
class FeedSource:
    """One data set of a mixture."""

    data: Location
    manifest: Manifest
    quarantine: Quarantine = field(default_factory=Quarantine)
    """Clips that are left out of the plan."""
    weight: float = 1.0
    """Share of each batch, beside the other weights."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What of it decides on the sample order."""
        return self.manifest.sha256, self.quarantine.sha256, self.weight


@dataclass(frozen=True)
class StagePlan:
    """The batches of one training stage."""

    steps: int
    batch_clips: int
    clip_frames: int
    frame_skip: int = 1
    window_stride: int | None = None
    """Distance of windows in a clip; None: end to end."""

    @property
    def shape(self) -> WindowShape:
        """How windows are cut."""
        return WindowShape(self.clip_frames, self.frame_skip, self.window_stride)


class ClipUse(NamedTuple):
    """A clip that a rank needs, and for how many windows."""

    clip: ClipKey
    uses: int


@dataclass(frozen=True)
class FeedPlan:
    """The batches of a whole run: its stages one after the other, numbered by one global step."""

    sources: tuple[FeedSource, ...]
    stages: tuple[StagePlan, ...]
    seed: int
    world: int
    """Number of ranks, at most the clips of a batch. Their shares of it differ by one clip at most."""
    decode: Decode = "auto"
    """Where clips are decoded: beside the trainer, in Ray Data tasks, or as the codec of the data suggests."""
    split: str = "train"
    truth: bool = False
    """Whether the true actions come along: for a world model of them alone, since FLAM never sees any."""
    key: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.batch_clips < self.world:
                raise SettingsError(
                    f"batch_clips {stage.batch_clips} leaves some of {self.world} workers without a clip",
                    fix="Use fewer workers, or larger batches in both stages.",
                )
            if self.truth and stage.frame_skip > 1:
                raise SettingsError(
                    f"frame_skip {stage.frame_skip} with true actions: each would span {stage.frame_skip} frames",
                    fix="Use frame_skip 1 in both stages, or train on latent actions.",
                )
        first, *others = (source.manifest for source in self.sources)
        for other in others:
            if other.frame_size != first.frame_size:
                raise SettingsError(
                    f"data sets {first.name} and {other.name} have frames of {first.frame_size} and {other.frame_size}",
                    fix="Ingest them with one --size to train on both.",
                )
        identity = tuple(source.identity for source in self.sources)
        object.__setattr__(self, "key", (identity, self.split, self.seed, self.stages, self.truth))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeedPlan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of every frame."""
        return self.sources[0].manifest.frame_size

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def batch_bytes(self) -> int:
        """Bytes of the largest batch of one rank."""
        frames = max(-(-stage.batch_clips // self.world) * stage.clip_frames for stage in self.stages)
        return frames * self.frame_size[0] * self.frame_size[1] * 3

    @cached_property
    def chunk_steps(self) -> int:
        """Steps that one read task serves for one rank.

        As many as make about 32 MB to send, for a task costs tens of milliseconds however little it reads; but not
        less than half of what a block of clips suffices for, since a block is sent as a whole.
        """
        halves, by_size = [], []
        for mixture in self.mixtures():
            sizes = [
                order.epoch_frames * self._sent_bytes(source) / (order.epoch_windows / order.batch_size)
                for source, order in enumerate(mixture.orders)
            ]
            by_size.append(_CHUNK_BYTES * self.world / sum(sizes))
            halves += [order.epoch_windows / order.epoch_blocks / order.batch_size / 2 for order in mixture.orders]
        return max(1, int(min(halves)), min(_CHUNK_STEPS, int(min(by_size))))

    def chunk(self, start: int, number: int) -> range:
        """The steps that task `number` of an execution serves which begins at step `start`; empty after the last."""
        first = start + number * self.chunk_steps
        return range(first, max(first, min(first + self.chunk_steps, self.total_steps)))

    def _sent_bytes(self, source: int) -> float:
        """Bytes a frame that travel from a task to the trainer."""
        manifest = self.sources[source].manifest
        if self.decodes_in_tasks(source):
            return float(self.frame_size[0] * self.frame_size[1] * 3)
        return manifest.total_bytes / manifest.frames

    def decodes_in_tasks(self, source: int) -> bool:
        """Whether clips of that data set are decoded in Ray Data tasks."""
        if self.decode == "auto":
            return get_codec(self.sources[source].manifest.codec).heavy
        return self.decode == "task"

    def mixtures(self) -> tuple[Mixture, ...]:
        """The sample order of each stage (made once per process). Raises DataError if the data do not suffice."""
        return _mixtures(self)

    def stage_of(self, step: int) -> tuple[int, int]:
        """The stage that a global step belongs to, and its number in it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError(f"step is {step} past the end of the run")

    def windows(self, step: int, rank: int) -> list[Window]:
        """What rank `rank` trains on at a global step, in order."""
        return self.windows_of(range(step, step + 1), rank)[0]

    def windows_of(self, steps: range, rank: int) -> list[list[Window]]:
        """What a rank trains on at each of the global steps: much faster than one by one."""
        found: list[list[Window]] = []
        for local, stage in self._by_stage(steps):
            mixture = self.mixtures()[stage]
            found += mixture.parts(local, rank_slice(mixture.batch_size, rank, self.world))
        return found

    def _by_stage(self, steps: range) -> Iterator[tuple[range, int]]:
        """The parts of `steps` that belong to one stage each, in the stage's own numbers, and the number of it."""
        first = 0
        for number, stage in enumerate(self.stages):
            local = range(max(0, steps.start - first), min(stage.steps, steps.stop - first))
            if local:
                yield local, number
            first += stage.steps

    def clips(self, steps: range, rank: int, *, begins: bool) -> list[ClipUse]:
        """The clips that a rank must be given before `steps`: those of every block that these steps are first to reach.

        begins: nothing was given to the rank before, so the blocks that `steps.start` lies within count too. The uses
        of a clip are all those in its block from `steps.start` on.
        """
        found: list[ClipUse] = []
        for local, number in self._by_stage(steps):
            stage, mixture = self.stages[number], self.mixtures()[number]
            places = rank_slice(mixture.batch_size, rank, self.world)
            for order, positions in zip(mixture.orders, mixture.positions, strict=True):
                low, high = np.searchsorted(positions, [places.start, places.stop]).tolist()
                for block in _reached(order, local, begins):
                    start = max(block.start, local.start * order.batch_size)
                    indices = np.arange(start, min(block.end, stage.steps * order.batch_size))
                    place = indices % order.batch_size
                    numbers = order.look_up(block, indices[(place >= low) & (place < high)])[0]
                    used, uses = np.unique(numbers, return_counts=True)
                    found += map(ClipUse, map(order.clip_key(block), used.tolist()), uses.tolist())
        return found


def _reached(order: SampleOrder, steps: range, begins: bool) -> Iterator[Block]:
    """The blocks whose first window falls into `steps`; with `begins` also the one that is under way."""
    block = order.block_at(steps.start * order.batch_size)
    while block.start < steps.stop * order.batch_size:
        if begins or block.start // order.batch_size >= steps.start:
            yield block
        block = order.block(block.number + 1)


@lru_cache(maxsize=2)
def _mixtures(plan: FeedPlan) -> tuple[Mixture, ...]:
    return tuple(
        Mixture(
            [
                SampleOrder(
                    source.manifest,
                    plan.split,
                    shape=stage.shape,
                    batch=batch,
                    seed=plan.seed + index,
                    left_out={s.name: source.quarantine.rows(s) for s in source.manifest.split(plan.split)},
                    source=number,
                )
                for number, (source, batch) in enumerate(
                    zip(plan.sources, shares([s.weight for s in plan.sources], stage.batch_clips), strict=True)
                )
            ]
        )
        for index, stage in enumerate(plan.stages)
    )
