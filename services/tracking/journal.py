"""A journal between a training process and MLflow: written down first, sent in the background until MLflow has it.

What is logged goes into numbered segments in the run's folder or bucket (`journal/00000001.jsonl`, ...), each line with
the time at which it was logged, and from there to MLflow. Training never waits for MLflow, and:

- nothing is lost: after `sync` all that was logged lies in the folder, so a checkpoint that is committed then never
  knows more than the history will;
- nothing comes twice: a step that the journal has is not taken again, and a segment that is sent again (the process was
  killed between sending and noting it) has the times it had, and MLflow drops rows that it has already.

This module knows nothing of FLAM. It serves any Ray Train job: open one on rank 0, `log` from the train function,
`sync` before a checkpoint is committed, `drain` in the driver.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flam_core.errors import DataError, EnvironmentFault
from services.storage import Location, exists, read_bytes, write_bytes
from services.tracking.server import STEP_METRIC, RunInfo, check_server, named, refusals

if TYPE_CHECKING:
    import mlflow

_METRICS_A_CALL = 900  # MLflow takes at most 1,000
_TAGS_A_CALL = 100
_CURSOR = "cursor.json"
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Line:
    """What was logged at one time: metrics of a step, or tags."""

    time_ms: int
    step: int | None
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    def to_json(self) -> str:
        """One line; `from_json` reads it."""
        return json.dumps({"time": self.time_ms, "step": self.step, "metrics": self.metrics, "tags": self.tags})

    @staticmethod
    def from_json(text: str) -> Line:
        """Raises ValueError or KeyError if it is not what `to_json` gave."""
        values = json.loads(text)
        return Line(int(values["time"]), values["step"], values["metrics"], values["tags"])


def segments(run: Location, first: int = 1) -> Iterator[tuple[int, list[Line]]]:
    """Numbers and lines of the journal of the run in `run`, from segment `first` on; nothing lists the bucket.

    Raises DataError if a segment is not one, EnvironmentFault if the storage does not answer.
    """
    number = first
    while exists(place := run / "journal" / _name(number)):
        try:
            yield number, [Line.from_json(line) for line in read_bytes(place).decode().splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place} is not a segment of a journal", fix="Was it edited by hand?") from error
        number += 1


class Journal:
    """The journal of one run. One process at a time may have it open."""

    def __init__(self, info: RunInfo, run: Location, *, interval: float = 2.0) -> None:
        """`interval`: seconds between segments. Raises EnvironmentFault if the folder cannot be read."""
        self.info = info
        self._run, self._interval = run, interval
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._unwritten: list[Line] = []
        self._unsent: list[tuple[int, list[Line]]] = []
        self._away: EnvironmentFault | None = None
        self._closed = False
        self._away_until = 0.0
        cursor = run / "journal" / _CURSOR
        sent: int = json.loads(read_bytes(cursor))["segments"] if exists(cursor) else 0
        self._last_segment = sent
        self.last_step = -1
        """The newest step in the journal; -1 if there is none."""
        for number, lines in segments(run, sent + 1):
            self._last_segment = number
            self._unsent.append((number, lines))
            self.last_step = _last_step(lines, self.last_step)
        while self.last_step < 0 < sent:  # what was sent last may be tags alone
            self.last_step = _last_step(next(segments(run, sent))[1], -1)
            sent -= 1
        self.last_step = max(self.last_step, info.last_step)  # a run's folder may be gone where its history is not
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        """Made when it is needed, by the thread that sends: this takes seconds, which a restarted worker need not wait
        for."""
        import mlflow

        return mlflow.MlflowClient(self.info.tracking_uri)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take all metrics of a step, unless the journal has that step or a later one already. Never waits."""
        if step <= self.last_step:
            return
        self.last_step = step
        values = {**{name: float(value) for name, value in named(metrics).items()}, STEP_METRIC: float(step)}
        self._take(Line(_now(), step, values, {}))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Take tags of the run. Never waits."""
        self._take(Line(_now(), None, {}, dict(tags)))

    def sync(self) -> None:
        """Put all that was logged into the run's folder. Raises EnvironmentFault if the folder does not take it."""
        with self._writing:
            lines = list(self._unwritten)
            if not lines:
                return
            number = self._last_segment + 1
            content = "".join(f"{line.to_json()}\n" for line in lines)
            write_bytes(self._run / "journal" / _name(number), content.encode())
            with self._changed:
                self._last_segment = number
                del self._unwritten[: len(lines)]
                self._unsent.append((number, lines))
                self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Until MLflow has everything. Raises EnvironmentFault if it does not take it within `seconds`."""
        self.sync()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._unsent, timeout=seconds):
                raise self._away or EnvironmentFault(
                    f"MLflow at {self.info.tracking_uri} did not take the run's metrics within {seconds:g} s",
                    fix="They are kept in the run's folder: the same command sends them.",
                )

    def pretend_away(self, seconds: float) -> None:
        """From now on behave as if MLflow did not answer for so long (`--chaos mlflow-down`)."""
        self._away_until = time.monotonic() + seconds

    def close(self) -> None:
        """Write down what is left and end the thread. What MLflow has not taken stays for the next to open it."""
        try:
            self.sync()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _take(self, line: Line) -> None:
        with self._changed:
            self._unwritten.append(line)

    def _work(self) -> None:
        """Write, send, wait: until closed. A call to MLflow may take minutes, so `sync` does not wait for this."""
        pause, next_try = 0.0, 0.0
        while True:
            with suppress(EnvironmentFault):  # `sync` raises it where it matters
                self.sync()
            if self._unsent and time.monotonic() >= next_try:
                pause = 0.0 if self._send() else min(_LONGEST_WAIT_SECONDS, 2 * pause or _FIRST_WAIT_SECONDS)
                next_try = time.monotonic() + pause
            with self._changed:
                if self._closed:
                    return
                if pause or not self._unsent:
                    self._changed.wait(min(self._interval, pause or self._interval))

    def _send(self) -> bool:
        """Whether MLflow took all segments that were there."""
        from mlflow.entities import Metric, RunTag

        waiting = list(self._unsent)
        lines = [line for _, of_segment in waiting for line in of_segment]
        try:
            if self._away is not None:
                check_server(self.info.tracking_uri)  # one quick question, where a call would be tried for minutes
            with refusals(self.info.tracking_uri, "does not take metrics", fix=_KEPT):
                if time.monotonic() < self._away_until:
                    raise ConnectionError("chaos: it is down")
                metrics = [
                    Metric(key, value, line.time_ms, line.step or 0)
                    for line in lines
                    for key, value in line.metrics.items()
                ]
                for start in range(0, len(metrics), _METRICS_A_CALL):
                    self._client.log_batch(self.info.run_id, metrics=metrics[start : start + _METRICS_A_CALL])
                merged: dict[str, str] = {}
                for line in lines:
                    merged |= line.tags
                tags = [RunTag(key, value) for key, value in merged.items()]
                for start in range(0, len(tags), _TAGS_A_CALL):
                    self._client.log_batch(self.info.run_id, tags=tags[start : start + _TAGS_A_CALL])
            write_bytes(self._run / "journal" / _CURSOR, json.dumps({"segments": waiting[-1][0]}).encode())
        except EnvironmentFault as fault:
            if self._away is None:
                print(f"warning: {fault}", flush=True)
            self._away = fault
            return False
        if self._away is not None:
            print(f"MLflow at {self.info.tracking_uri} is back and has all {len(lines)} log lines", flush=True)
        with self._changed:
            self._away = None
            del self._unsent[: len(waiting)]
            self._changed.notify_all()
        return True


_KEPT = "Training goes on; what it logs is kept in the run's folder and sent when MLflow is back."


def _name(number: int) -> str:
    return f"{number:08d}.jsonl"


def _last_step(lines: list[Line], before: int) -> int:
    return max([before, *(line.step for line in lines if line.step is not None)])


def _now() -> int:
    return int(time.time() * 1000)
