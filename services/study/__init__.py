"""Studies: many small trainings that together answer one question, as Ray tasks."""

from services.study.plan import Cell, StudySettings, ablation_cells, factoring_cells
from services.study.run import run_study

__all__ = ["Cell", "StudySettings", "ablation_cells", "factoring_cells", "run_study"]
