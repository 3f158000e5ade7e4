"""Training: the driver's side of a run on Ray Train, and what each worker does."""

from services.training.launch import RunResult, TrainSettings, prepare, train

__all__ = ["RunResult", "TrainSettings", "prepare", "train"]
