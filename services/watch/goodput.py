"""The goodput ledger: each second of a run's wall time in one bucket."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from flam_core.errors import DataError
from services.storage import Location, exists, read_bytes, write_bytes
from services.watch.beats import BUCKETS, Beat, Bucket

_FILE = "goodput.json"
_SAVE_SECONDS = 5.0


@dataclass
class Attempt:
    """One time that the command ran."""

    started: float
    """Unix time."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    restarts: int = 0
    """How often Ray Train started the workers anew."""
    workers: list[int] = field(default_factory=list)
    """The numbers of workers that it had, one after the other."""

    @property
    def wall(self) -> float:
        """All its seconds."""
        return sum(self.seconds.values())


class Goodput:
    """The ledger of a run over all attempts, of which the last is this one.

    Rank 0 says where its time went; what is left between two groups of workers is `restart`, before the first
    `start_up`, after the last `evaluation`. So nothing is missing and nothing counts twice.
    """

    def __init__(self, run: Location, *, started: float | None = None) -> None:
        """started: Unix time at which the program began. Raises DataError if there is a ledger that cannot be read."""
        self._place = run / _FILE
        self.furthest = -1
        """The furthest step that any worker has begun."""
        self.step_seconds = 0.0
        """What a step took last."""
        self.spans: list[str] = []
        """Objects below `spans/` in the run's folder."""
        self.before: list[Attempt] = []
        self.now = Attempt(time.time() if started is None else started)
        self._of_group: Mapping[Bucket, float] = {}
        self._group: tuple[str, int] | None = None
        self._saved_at = 0.0
        if exists(self._place):
            try:
                found = json.loads(read_bytes(self._place))
                self.furthest, self.step_seconds = int(found["furthest"]), float(found["step_seconds"])
                self.spans = list(found["spans"])
                self.before = [Attempt(**one) for one in found["attempts"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self._place} is not a ledger", fix="Was it edited by hand? The run does without it: delete it."
                ) from error

    def hear(self, beat: Beat) -> None:
        """Take what rank 0 says."""
        if (beat.node, beat.pid) != self._group:
            self._close_group()
            self._group = beat.node, beat.pid
            self.now.workers.append(beat.world)
            self.now.restarts = len(self.now.workers) - 1
            self._of_group = self._counted(beat)
            self._rest_to("start_up" if self.now.restarts == 0 else "restart")
        self._of_group = self._counted(beat)

    def _counted(self, beat: Beat) -> dict[Bucket, float]:
        """What rank 0 says of its time. What a later group takes to start is the price of the restart."""
        seconds = dict(beat.seconds)
        if self.now.restarts:
            seconds["restart"] = seconds.get("restart", 0.0) + seconds.pop("start_up", 0.0)
        return seconds

    def training_ended(self) -> None:
        """The workers are gone; what follows is `evaluation`."""
        self._close_group()
        self._rest_to("start_up")  # to end the workers is the other half of starting them

    def end(self) -> None:
        """The program ends now."""
        self._close_group()
        self._rest_to("evaluation" if self.now.workers else "start_up")

    def _close_group(self) -> None:
        for bucket, seconds in self._of_group.items():
            self.now.seconds[bucket] += seconds
        self._of_group = {}

    def _rest_to(self, bucket: Bucket) -> None:
        """Whatever wall time is in no bucket goes to this one."""
        known = self.now.wall + sum(self._of_group.values())
        self.now.seconds[bucket] += max(0.0, time.time() - self.now.started - known)

    def totals(self) -> dict[str, float]:
        """Seconds in each bucket, over all attempts."""
        found = dict.fromkeys(BUCKETS, 0.0)
        for one in [*self.before, self.now]:
            for bucket in BUCKETS:
                found[bucket] += one.seconds[bucket]
        for bucket, seconds in self._of_group.items():
            found[bucket] += seconds
        return {str(bucket): seconds for bucket, seconds in found.items()}

    def metrics(self) -> dict[str, float]:
        """For MLflow: `goodput/productive_share` and so on, `goodput/wall_seconds`, `.../restarts`, `.../attempts`."""
        totals = self.totals()
        wall = sum(totals.values()) or 1.0
        return {
            **{f"goodput/{bucket}_share": seconds / wall for bucket, seconds in totals.items()},
            "goodput/wall_seconds": wall,
            "goodput/restarts": float(sum(one.restarts for one in [*self.before, self.now])),
            "goodput/attempts": float(len(self.before) + 1),
        }

    def save_if_due(self) -> None:
        """`save`, every few seconds."""
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the ledger into the run's folder. Raises EnvironmentFault if that does not take it."""
        self._saved_at = time.monotonic()
        now = Attempt(**asdict(self.now))
        for bucket, seconds in self._of_group.items():
            now.seconds[bucket] += seconds
        content = {
            "furthest": self.furthest,
            "step_seconds": self.step_seconds,
            "spans": self.spans,
            "attempts": [asdict(one) for one in [*self.before, now]],
        }
        write_bytes(self._place, (json.dumps(content, indent=2) + "\n").encode())
