"""Training: the driver's side of a run on Ray Train, and what each worker does."""

from services.training.launch import RunResult, train
from services.training.prepare import Prepared, prepare
from services.training.runs import RunState, follow, list_runs
from services.training.settings import TrainSettings

__all__ = ["Prepared", "RunResult", "RunState", "TrainSettings", "follow", "list_runs", "prepare", "train"]
