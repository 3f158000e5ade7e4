"""Trials of a sweep, and what is kept of those that have ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flam_core.config import Config
from flam_core.errors import DataError
from services.storage import Location, exists, read_bytes, write_bytes
from services.sweep.space import Point

ASHA = "asha"
"""`Record.stopped_by` of a trial that was stopped since others are better."""


@dataclass(frozen=True)
class Trial:
    """A training of a point with a seed."""

    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Such as `k4-gaussian-w64-b0.0002-fsq8x8x8-seed1`."""
        return f"{self.point.name}-seed{self.seed}"

    def config(self, base: Config) -> Config:
        """What it trains, but for the tokenizer, which it is given."""
        return self.point.config(base, self.seed)


@dataclass(frozen=True)
class Look:
    """What held-out clips said of a trial while it trained."""

    step: int
    """Steps of stage 2."""
    metrics: Mapping[str, float]
    """As in docs/metrics.md."""


@dataclass(frozen=True)
class Record:
    """A trial that has ended."""

    name: str
    run_id: str
    stopped_by: str | None
    """None: it came to its end. `asha`; the name of a collapse, such as `posterior-collapse`; `failed: ` and why."""
    metrics: Mapping[str, float]
    """Of its end, on the test split; of a trial that was stopped, those of its last look, on the split `val`."""
    seconds: float
    """Wall time of its run, over all attempts."""
    steps: int
    """Steps of stage 2 that it did."""
    looks: tuple[Look, ...] = field(default=())

    @property
    def failed(self) -> bool:
        """Whether its training failed."""
        return (self.stopped_by or "").startswith("failed: ")

    def to_json(self) -> bytes:
        """`from_json` reads it."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(content: bytes, where: str) -> Record:
        """Raises DataError if it is not what `to_json` gave."""
        try:
            values: dict[str, Any] = json.loads(content)
            looks = tuple(Look(**look) for look in values.pop("looks"))
            return Record(**values, looks=looks)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where} is not the record of a trial", fix="Was it edited by hand?") from error


def read_record(sweep: Location, trial: Trial) -> Record | None:
    """Of a trial that has ended; None if it has not."""
    place = _place(sweep, trial.name)
    return Record.from_json(read_bytes(place), str(place)) if exists(place) else None


def write_record(sweep: Location, record: Record) -> None:
    """For `read_record`: from now on the trial is not trained again."""
    write_bytes(_place(sweep, record.name), record.to_json())


def _place(sweep: Location, name: str) -> Location:
    return sweep / "trials" / f"{name}.json"
