"""What the feed reads for each step: a pure function of the plan, so any process can compute any part of it.

This module and `read` run in Ray Data tasks: they import neither torch nor Ray, which keeps the tasks quick to start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from flam_core.data.manifest import Manifest
from flam_core.data.order import SampleOrder, Window, rank_slice
from flam_core.errors import SettingsError
from services.storage import Location

_CHUNK_BYTES = 16 << 20
_CHUNK_STEPS = 32


@dataclass(frozen=True)
class StagePlan:
    """The batches of one training stage."""

    steps: int
    batch_clips: int
    clip_frames: int


@dataclass(frozen=True)
class FeedPlan:
    """The batches of a whole run: its stages one after the other, numbered by one global step."""

    data: Location
    manifest: Manifest
    stages: tuple[StagePlan, ...]
    seed: int
    world: int
    """Number of ranks; it divides each stage's batch."""
    split: str = "train"
    key: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.batch_clips % self.world:
                raise SettingsError(
                    f"batch_clips {stage.batch_clips} cannot be shared evenly by {self.world} workers",
                    fix="Choose a number of workers that divides the batch of both stages.",
                )
        object.__setattr__(self, "key", (self.manifest.sha256, self.split, self.seed, self.stages))

    @property
    def chunk_steps(self) -> int:
        """Steps that one read task prepares for one rank.

        Many, so that a clip is decoded once for several windows and Ray has few tasks to schedule; but not more than
        makes a block of about 16 MB.
        """
        height, width = self.manifest.frame_size
        largest = max(stage.batch_clips * stage.clip_frames for stage in self.stages)
        step_bytes = largest // self.world * height * width * 3
        return max(1, min(_CHUNK_STEPS, _CHUNK_BYTES // max(1, step_bytes)))

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def orders(self) -> tuple[SampleOrder, ...]:
        """The sample order of each stage (made once per process). Raises DataError if the data do not suffice."""
        return _orders(self)

    def stage_of(self, step: int) -> tuple[int, int]:
        """The stage that a global step belongs to, and its number in it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError(f"step is {step} past the end of the run")

    def windows(self, step: int, rank: int) -> list[Window]:
        """What rank `rank` trains on at a global step, in order."""
        index, local = self.stage_of(step)
        batch = self.orders()[index].batch(local)
        return batch[rank_slice(len(batch), rank, self.world)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeedPlan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=2)
def _orders(plan: FeedPlan) -> tuple[SampleOrder, ...]:
    return tuple(
        SampleOrder(
            plan.manifest, plan.split, frames=stage.clip_frames, batch=stage.batch_clips, seed=plan.seed + index
        )
        for index, stage in enumerate(plan.stages)
    )
