"""Make a candidate champion, if it is shown to be better and in nothing much worse.

    python jobs/promote.py flam-grid                 # candidate against champion, on the candidate's data
    python jobs/promote.py flam-grid --version 7 --dry_run
    python jobs/promote.py flam-grid --data s3://bucket/grid --margins.leakage 0.01
    python jobs/promote.py flam-grid --rollback      # the previous champion again

Both are measured on the same held-out episodes, as the challenger's own run was. Exit code 0: promoted (or would be),
6: refused, with the reason.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/promote.py` puts only jobs/ on the path

from flam_core.errors import Refused, SettingsError
from services.console import run_program, table
from services.registry.gate import Decision, Margins
from services.registry.promote import Promotion, promote, roll_back
from services.tracking.server import default_tracking_uri
from services.training.prepare import home


@dataclass(frozen=True)
class Arguments:
    """What `jobs/promote.py` takes."""

    model: tyro.conf.Positional[str]
    """The registered model, such as flam-grid."""
    version: str | None = None
    """The challenger; default: the version with the alias `candidate`."""
    data: str | None = None
    """The data set whose held-out episodes decide; default: the one that the challenger was trained on."""
    manifest: str | None = None
    """The sha256 that the data set's manifest must have: it then is the frozen one that was meant."""
    tracking: str | None = None
    """MLflow's address; default MLFLOW_TRACKING_URI, else an SQLite file beside the outputs."""
    dry_run: bool = False
    """Decide, and move no alias."""
    rollback: bool = False
    """Make the previous champion champion again, measuring nothing."""
    seed: int = 0
    """Of the bootstrap."""
    margins: Margins = field(default_factory=Margins)

    def __post_init__(self) -> None:
        if self.rollback and (self.dry_run or self.version or self.data):
            raise SettingsError("--rollback goes with no other choice", fix="Leave --version, --data, --dry_run out.")


def main(arguments: Arguments) -> None:
    """Decide, and say why."""
    tracking = arguments.tracking or default_tracking_uri(home())
    if arguments.rollback:
        now, before = roll_back(tracking, arguments.model)
        was = "none" if before is None else f"version {before}"
        table(arguments.model, {"champion": f"version {now} (it was {was}, which is `previous` now)"})
        return
    promotion = Promotion(
        tracking, arguments.model, arguments.version, arguments.data, arguments.manifest, arguments.seed
    )
    decision, place = promote(promotion, arguments.margins, dry_run=arguments.dry_run)
    show(arguments, decision, place)
    if not decision.promoted:
        raise Refused(
            f"version {decision.challenger} of {arguments.model} does not become champion: {decision.why}",
            fix="Nothing was changed.",
        )


def show(arguments: Arguments, decision: Decision, place: str) -> None:
    """The numbers that it was decided by."""
    against = "the last known frame" if decision.champion is None else f"version {decision.champion}"
    gain = decision.gain
    spread = "" if gain.low is None else f", 95 % {gain.low:+.2f} to {gain.high:+.2f} over {gain.n} episodes"
    rows = {
        "challenger": f"version {decision.challenger}",
        "champion": against if decision.champion else "none",
        f"gain in {decision.metric}": f"{gain.mean:+.2f} dB over {against}{spread}",
    }
    for guard in decision.guards:
        values = [("-" if value is None else f"{value:.3f}") for value in (guard.challenger, guard.champion)]
        said = "not measured" if guard.champion is None else "holds" if guard.passed else "worse than its margin"
        rows[guard.metric] = f"{values[0]} against {values[1]}, margin {guard.margin:.3g}: {said}"
    verdict = "champion" if decision.promoted else "refused"
    rows["decision"] = f"{'(dry run) ' if arguments.dry_run else ''}{verdict}: {decision.why}"
    rows["report"] = place
    table(arguments.model, rows)


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
