"""The feed: Ray Data turns the sample plan into batches of frames for the trainer's ranks."""

from services.feed.assemble import Assembler, StepBatch
from services.feed.local import local_steps
from services.feed.meters import FeedMeters
from services.feed.plan import Decode, FeedPlan, FeedSource, StagePlan
from services.feed.stream import CacheSettings, flam_cause, make_dataset, steps_of

__all__ = [
    "Assembler",
    "CacheSettings",
    "Decode",
    "FeedMeters",
    "FeedPlan",
    "FeedSource",
    "StagePlan",
    "StepBatch",
    "flam_cause",
    "local_steps",
    "make_dataset",
    "steps_of",
]
