"""Steps that are left out because their batches spoilt the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from flam_core.errors import DataError, TrainingFailed
from services.storage import Location, exists, read_bytes, write_bytes

AT_MOST = 3
"""Times that a run goes back. What spoils it more often is no accident."""
_FILE = "skipped.json"


@dataclass(frozen=True)
class Spoilt:
    """One time that the run went back."""

    steps: list[int]
    """Global steps that are left out from then on."""
    why: str


class WentBack(RuntimeError):
    """Tells Ray Train to start the workers anew, from the checkpoint before the steps that are left out."""


def read_spoilt(run: Location) -> list[Spoilt]:
    """The times that a run went back. Raises DataError if the file is none of these."""
    place = run / _FILE
    if not exists(place):
        return []
    try:
        return [Spoilt(list(map(int, one["steps"])), str(one["why"])) for one in json.loads(read_bytes(place))]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} does not name steps", fix="Was it edited by hand?") from error


def record_spoilt(run: Location, spoilt: Spoilt) -> None:
    """Note that steps are to be left out. Raises TrainingFailed if the run went back too often already."""
    known = read_spoilt(run)
    if len(known) >= AT_MOST:
        before = "; ".join(one.why for one in known)
        raise TrainingFailed(
            f"{spoilt.why}, after the run went back {AT_MOST} times already ({before})",
            fix="Lower the learning_rate or the clip_norm of the stage, or look at the data of these steps.",
        )
    content = [asdict(one) for one in [*known, spoilt]]
    write_bytes(run / _FILE, (json.dumps(content, indent=2) + "\n").encode())
