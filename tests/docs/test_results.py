"""What docs/results holds says what the documents claim of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.sweep.analysis import differences, wanted_factors

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def committed(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def test_the_sweep_shows_how_many_factors_the_data_want() -> None:
    found = committed("sweep.json")
    assert len(found["trials"]) >= 12
    wanted = wanted_factors(found)
    assert wanted is not None
    assert wanted[0] == 4
    (more,) = [one for one in differences(found, "factors") if (one.value, one.other) == (4, 2)]
    assert more.verdict == "better"


def test_the_sweep_found_the_cliff_of_beta() -> None:
    stopped = {(row["beta"], row["stopped_by"]) for row in committed("sweep.json")["trials"]}
    assert {why for beta, why in stopped if beta == 0.3} == {"posterior-collapse"}
    assert not {why for beta, why in stopped if beta < 0.3} & {"posterior-collapse"}


@pytest.mark.parametrize(("labels", "shown"), [(1000, True), (10000, False)])
def test_flams_policy_beats_cloning_where_labels_are_few_and_is_not_behind_where_they_are_many(
    labels: int, shown: bool
) -> None:
    (row,) = [
        row
        for row in committed("policy.json")["rows"]
        if (row["env"], row["method"], row["labels"]) == ("grid", "flam", labels)
    ]
    assert row["seeds"] == 3
    assert row["over_bc"]["mean"] > 0
    assert (row["over_bc"]["low"] > 0) == shown
