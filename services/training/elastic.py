"""Numbers of workers that change while a run goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import ray.data
import ray.train
from ray.data import ExecutionOptions

from flam_core.errors import SettingsError
from services.feed import CacheSettings, FeedPlan, make_dataset
from services.storage import Location
from services.training import checkpoints


@dataclass(frozen=True)
class Workers:
    """How many workers a run may have."""

    least: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether the number may change."""
        return self.least < self.most

    def for_ray(self) -> int | tuple[int, int]:
        """As `ScalingConfig` wants it."""
        return (self.least, self.most) if self.elastic else self.most


def parse_workers(text: str) -> Workers:
    """`4`, or `2:8` for from 2 to 8, as many as the cluster has room for. Raises SettingsError if it is neither."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    found = None if match is None else Workers(int(match[1]), int(match[2] or match[1]))
    if found is None or not 1 <= found.least <= found.most:
        raise SettingsError(f"workers = {text}", fix="Use a number from 1 on, or a range such as 2:8.")
    return found


class ElasticData(ray.train.DataConfig):
    """Makes the feed's data set for as many workers as a group has, from the newest committed step on.

    Ray Train calls `configure` whenever it starts a group; what it was given as the data set is left aside.
    """

    def __init__(
        self,
        plan: FeedPlan,
        run: Location,
        *,
        task_cpus: float,
        cache: CacheSettings | None,
        options: ExecutionOptions,
    ) -> None:
        super().__init__(execution_options=options)
        self._plan, self._run, self._task_cpus, self._cache = plan, run, task_cpus, cache

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **more: Any
    ) -> list[dict[str, Any]]:
        """The iterator of each rank."""
        plan, start = replace(self._plan, world=world_size), checkpoints.newest_step(self._run)
        made = {"train": make_dataset(plan, start, task_cpus=self._task_cpus, cache=self._cache)}
        return super().configure(made, world_size, worker_handles, worker_node_ids, **more)


def nothing() -> ray.data.Dataset:
    """A data set that takes the place of the one that `ElasticData` makes."""
    return ray.data.range(1)
