"""The feed: Ray Data turns the sample plan into batches of frames for the trainer's ranks."""

from services.feed.plan import FeedPlan, StagePlan
from services.feed.stream import StepBatch, flam_cause, make_dataset, steps_of

__all__ = ["FeedPlan", "StagePlan", "StepBatch", "flam_cause", "make_dataset", "steps_of"]
