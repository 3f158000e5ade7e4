"""What a worker did when, as lines of JSON in the trace event format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from statistics import median

from flam_core.errors import EnvironmentFault
from services.storage import Location, exists, read_bytes, write_bytes
from services.watch.beats import Stage

_FLUSH_SECONDS = 10.0
_ALL_STEPS, _EVERY = 100, 50
"""Of the first so many steps every stage is kept, then of every so many-th step, and of slow ones."""
_SLOW_TIMES = 3.0
_RARE: tuple[Stage, ...] = ("load", "start", "evaluation", "checkpoint")
_MOST = 50_000


class Spans:
    """The spans of one worker, kept in one object of the run's folder that is written anew now and then."""

    def __init__(self, run: Location, rank: int) -> None:
        self.name = f"{int(time.time() * 1000)}-rank-{rank}.jsonl"
        """Of the object, below `spans/` in the run's folder."""
        self._place, self._rank = run / "spans" / self.name, rank
        self._lines: list[str] = []
        self._took: dict[Stage, list[float]] = {}
        self._first_step: int | None = None
        self._flushed_at, self._flushed = time.monotonic(), 0

    def add(self, stage: Stage, step: int, seconds: float) -> None:
        """A stage of a step is over that took so long."""
        if self._first_step is None and stage == "data":
            self._first_step = step
        if len(self._lines) < _MOST and self._worth_keeping(stage, step, seconds):
            begun = time.time() - seconds
            event = {
                "name": stage,
                "ph": "X",
                "ts": round(begun * 1e6),
                "dur": round(seconds * 1e6),
                "pid": self._rank,
                "tid": 0,
                "args": {"step": step},
            }
            self._lines.append(json.dumps(event))

    def _worth_keeping(self, stage: Stage, step: int, seconds: float) -> bool:
        if stage in _RARE or step % _EVERY == 0 or step - (self._first_step or 0) < _ALL_STEPS:
            took = self._took.setdefault(stage, [])
            if len(took) < _ALL_STEPS:
                took.append(seconds)
            return True
        usual = self._took.get(stage)
        return usual is not None and seconds > _SLOW_TIMES * median(usual) + 0.001

    def flush_if_due(self) -> None:
        """`flush`, every few seconds, and first when a step is done: how a worker began stays, however soon it ends."""
        begun = self._first_step is not None and not self._flushed
        if begun or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all spans so far. Storage that does not take them is no reason to stop training."""
        self._flushed_at = time.monotonic()
        lines = list(self._lines)
        if len(lines) > self._flushed:
            with suppress(EnvironmentFault):
                write_bytes(self._place, "".join(f"{line}\n" for line in lines).encode())
                self._flushed = len(lines)


def merged(run: Location, names: list[str]) -> str:
    """The spans of those workers as one trace (JSON), with a name for each rank."""
    events: list[dict[str, object]] = []
    for name in names:
        place = run / "spans" / name
        if exists(place):
            events += [json.loads(line) for line in read_bytes(place).decode().splitlines()]
    ranks = sorted({int(str(event["pid"])) for event in events})
    named = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in ranks]
    return json.dumps({"traceEvents": [*named, *events]})
