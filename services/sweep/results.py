"""What a sweep found, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from services.sweep.prepare import Sweep
from services.sweep.trials import Record


def results(sweep: Sweep, records: Mapping[str, Record]) -> dict[str, Any]:
    """What `sweep.json` holds: each trial with its settings, metrics, seconds and what stopped it."""
    rows = []
    for trial in sweep.trials:
        if (record := records.get(trial.name)) is None:
            continue
        rows.append(
            {
                "name": trial.name,
                "run": record.run_id,
                **trial.point.values,
                "seed": trial.seed,
                "metrics": dict(record.metrics),
                "seconds": record.seconds,
                "steps": record.steps,
                "stopped_by": record.stopped_by,
                "looks": [asdict(look) for look in record.looks],
            }
        )
    return {
        "sweep": sweep.name,
        "recipe": sweep.base.recipe,
        "dataset": sweep.data_name,
        "objectives": [asdict(goal) for goal in sweep.goals],
        "steps": sweep.base.flam_stage.steps,
        "trials": rows,
    }
