"""What a worker says of itself every second, what it is told in return, and where its time goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal[
    "load", "start", "data", "forward", "backward", "optimiser", "report", "evaluation", "checkpoint", "end"
]
"""What a worker is doing, in the order in which a step does it.

`load`: the weights come back; `start`: until the first batch; `end`: all is done.
"""
STAGES: tuple[Stage, ...] = (
    "load",
    "start",
    "data",
    "forward",
    "backward",
    "optimiser",
    "report",
    "evaluation",
    "checkpoint",
    "end",
)

Bucket = Literal["productive", "data_wait", "checkpoint", "evaluation", "restart", "recompute", "start_up"]
"""Each second of a run belongs to one of these."""
BUCKETS: tuple[Bucket, ...] = (
    "productive",
    "data_wait",
    "checkpoint",
    "evaluation",
    "restart",
    "recompute",
    "start_up",
)
_BUCKET_OF: dict[Stage, Bucket] = {
    "load": "start_up",
    "start": "start_up",
    "data": "data_wait",
    "forward": "productive",
    "backward": "productive",
    "optimiser": "productive",
    "report": "productive",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint",
    "end": "start_up",
}


def bucket_of(stage: Stage, *, again: bool) -> Bucket:
    """Where time in a stage counts; `again` for a step that was done before and lost."""
    bucket = _BUCKET_OF[stage]
    return "recompute" if again and bucket in ("productive", "data_wait") else bucket


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life."""

    rank: int
    world: int
    node: str
    """Ray's id of its node."""
    host: str
    pid: int
    process_started: float
    """Unix time; with it, a pid names one process for good."""
    step: int
    """The global step in hand, from 0."""
    stage: Stage
    stage_seconds: float
    """For which it has been in this stage."""
    median_step_seconds: float
    """Of its latest steps; 0 before there are any."""
    seconds: Mapping[Bucket, float] = field(default_factory=dict)
    """Where its time went since it began; they add up to all of it."""
    line: str = ""
    """What the log last said (rank 0)."""
    machine: Mapping[str, float] = field(default_factory=dict)
    """System metrics of its node, from one worker of each node."""
    spans: str = ""
    """The object below `spans/` in the run's folder that it writes."""


@dataclass(frozen=True)
class Orders:
    """What all workers are told."""

    stop: str = ""
    """Why to commit a checkpoint and end; empty: go on."""
    dump: int = 0
    """How often all were asked for their stacks."""
    furthest: int = -1
    """The furthest step that any worker of the run has begun: up to it, steps are done again."""
    step_seconds: float = 0.0
    """What a step took last; 0 if that is not known."""
    machines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """System metrics by node: `node-0`, `node-1`, in the order of the lowest ranks there."""
