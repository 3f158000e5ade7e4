"""What a sweep is told beside its config and its space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flam_core.errors import SettingsError


@dataclass(frozen=True)
class SweepSettings:
    """How the space is searched."""

    search: Literal["grid", "tpe"] = "grid"
    """All points, or those that Optuna's multi-objective TPE asks for."""
    points: int = 0
    """How many points TPE may ask for."""
    seeds: int = 1
    """Trainings of each point, with seeds from the config's on."""
    at_a_time: int = 0
    """Trials at a time; 0: as many as there is room for."""
    evaluations: int = 10
    """How often each trial is measured on held-out clips while it trains, which is when it may be stopped."""
    reduction: float = 2.0
    """Of the trials that come to a milestone the best 1 / reduction go on (ASHA), and milestones lie as far apart. 1:
    all trials go on to their end."""
    grace: float = 0.4
    """Share of a trial's steps before which ASHA stops none: FLAM leaves its plateau late."""
    stop_collapsed: bool = True
    """Stop trials that the watch says are lost, by name (docs/learning.md)."""
    optuna: str | None = None
    """Optuna's storage, such as postgresql://...; default: an SQLite file beside the outputs."""

    def __post_init__(self) -> None:
        for name in ("seeds", "evaluations"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}", fix="It must be at least 1.")
        if self.at_a_time < 0:
            raise SettingsError(f"at_a_time = {self.at_a_time}", fix="Use 1 or more, or 0 for as many as fit.")
        if not self.reduction >= 1:
            raise SettingsError(f"reduction = {self.reduction}", fix="Use a number above 1, or 1 to stop none.")
        if not 0 < self.grace <= 1:
            raise SettingsError(f"grace = {self.grace}", fix="It is a share of the steps: above 0, to 1.")
        if (self.search == "tpe") != (self.points > 0):
            raise SettingsError(
                f"search {self.search} with points = {self.points}",
                fix="--search tpe needs --points, how many it may try; --search grid takes all and no number.",
            )
