"""When a run stands still, and who is to blame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.watch.beats import STAGES, Beat, Stage

_TIMES_MEDIAN = 20
_PATIENCE: dict[Stage, float] = {"load": 10.0, "start": 10.0, "evaluation": 10.0, "checkpoint": 5.0, "end": 10.0}
"""Times the usual limit for stages that take long by nature."""


@dataclass(frozen=True)
class Stall:
    """A worker that has stopped going on."""

    beat: Beat
    seconds: float
    answers: bool
    """Whether its process still says that it is alive."""
    others: tuple[Beat, ...] = ()
    """Workers that are no further than it."""

    def blame(self, stacks: Mapping[int, str]) -> Stall:
        """The same, of the one among those no further that does not just wait for the others, by their stacks."""
        if not self.answers or not _waits(stacks.get(self.beat.rank, "")):
            return self
        busy = [one for one in self.others if one.rank in stacks and not _waits(stacks[one.rank])]
        if not busy:
            return self
        rest = tuple(one for one in (self.beat, *self.others) if one is not busy[0])
        return Stall(busy[0], busy[0].stage_seconds, answers=True, others=rest)

    def sentence(self, reads: str) -> str:
        """Rank, stage and shard in one sentence; `reads` says what the step reads, if that is known."""
        beat = self.beat
        what = f"has been in stage {beat.stage} of step {beat.step}" if self.answers else "has not answered"
        where = f", after stage {beat.stage} of step {beat.step}" if not self.answers else ""
        data = f", which reads {reads}" if reads else ""
        return (
            f"rank {beat.rank} of {beat.world} (pid {beat.pid} on {beat.host}) {what} for {self.seconds:.0f} s"
            f"{where}{data}"
        )


def find_stall(beats: Mapping[int, Beat], silent: Mapping[int, float], base: float) -> Stall | None:
    """The worker that holds all others up, if nothing has gone on for too long.

    Too long is the larger of `base` seconds and 20 times a median step, and more where a stage takes long by nature.
    Ranks wait for one another in the backward pass, so the one to blame is the one that is furthest behind.
    """
    if not beats:
        return None
    limit = max(base, _TIMES_MEDIAN * max(beat.median_step_seconds for beat in beats.values()))
    mute = {rank: seconds for rank, seconds in silent.items() if seconds > limit and beats[rank].stage != "end"}
    if mute:
        rank = max(mute, key=lambda one: mute[one])
        return Stall(beats[rank], mute[rank], answers=False)
    behind = min(
        (beat for beat in beats.values() if beat.stage != "end"),
        key=lambda beat: (beat.step, STAGES.index(beat.stage), -beat.stage_seconds),
        default=None,
    )
    if behind is None or behind.stage_seconds <= limit * _PATIENCE.get(behind.stage, 1.0):
        return None
    others = tuple(
        beat for beat in beats.values() if beat is not behind and (beat.step, beat.stage) == (behind.step, behind.stage)
    )
    return Stall(behind, behind.stage_seconds, answers=True, others=others)


def _waits(stack: str) -> bool:
    """Whether a process is inside a collective operation."""
    return any(place in stack for place in ("torch/nn/parallel/distributed.py", "torch/distributed/"))
