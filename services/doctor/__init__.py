"""Doctor: looks at a cluster before a run does, and says of each thing whether it is well and what to do if not."""

from services.doctor.examine import DoctorSettings, examine
from services.doctor.finding import Finding, State

__all__ = ["DoctorSettings", "Finding", "State", "examine"]
