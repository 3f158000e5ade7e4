"""What ended the workers of a run, and when it was noticed."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import ray.train

from flam_core.errors import EnvironmentFault
from services.storage import Location, write_bytes
from services.training.job import FAILURES


class Failures(ray.train.UserCallback):
    """Writes `failures/<milliseconds>.json` into the run's folder whenever workers end otherwise than they should:
    Unix time, and the last line of each rank's error."""

    def __init__(self, run: Location) -> None:
        self._run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls it in its controller."""
        now = time.time()
        errors = {str(rank): _last_line(error) for rank, error in sorted(worker_exceptions.items())}
        with suppress(EnvironmentFault):  # a store that is away is no reason to end the run as well
            content = json.dumps({"time": now, "errors": errors}).encode()
            write_bytes(self._run / FAILURES / f"{int(now * 1000)}.json", content)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
