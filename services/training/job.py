"""What a worker is given, and what lies in a run's folder beside its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flam_core.config import Config
from services.feed import FeedPlan
from services.storage import Location
from services.tracking.server import RunInfo

TOKENIZER = "tokenizer.safetensors"
"""A tokenizer that was given."""
FEED_TOTALS = "feed.json"
"""What the feed did in the run's last attempt."""
FAILURES = "failures"
"""What ended workers, and when (`services.training.failures`)."""
STARTS = "starts.json"
"""How often workers began in a row without a new checkpoint."""
KEPT_FOR_RESUME = (
    *("checkpoints", "journal", "ray", "spans", "stalls", "chaos"),
    *("lease.json", "goodput.json", FAILURES, STARTS, FEED_TOTALS, TOKENIZER, "trace.json"),
)
"""What belongs to the run and to no report."""


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker needs to know."""

    config: Config
    plan: FeedPlan
    """For any number of ranks."""
    run: Location
    tracking: RunInfo
    control: Any
    """What `services.watch.start_control` gave."""
    threads: int
    """CPU threads of PyTorch; 0: the cores of the worker's machine but one, shared out among its workers."""
    max_bad_share: float
    """Share of clips that may turn out to be broken."""
    parallel: Literal["ddp", "fsdp"]
    keep: int
    """Newest checkpoints that are kept."""
    clips_at_a_time: int
    """That go through the model together on one rank; 0: all of its part of a batch."""
    compiled: bool
    recomputed: bool
    max_restarts: int
    """Times that workers may begin in a row without a new checkpoint."""
    chaos: tuple[str, ...]
    """Faults to bring about (`services.training.chaos`)."""


@dataclass(frozen=True)
class Finished:
    """What `services.training.finish` left."""

    outputs: Path
    metrics: dict[str, float]
    model_address: str | None
