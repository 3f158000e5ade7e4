"""What docs/results holds says what the documents claim of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from services.sweep.analysis import differences, wanted_factors

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
CELLS = RESULTS / "cells"


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


def policy(env: str, method: str, labels: int | None = None) -> dict[str, Any]:
    (row,) = [
        row
        for row in committed("policy.json")["rows"]
        if (row["env"], row["method"], row["labels"]) == (env, method, labels)
    ]
    return row


@pytest.mark.parametrize("labels", [1000, 10000])
@pytest.mark.parametrize("env", ["grid", "bigfish"])
def test_flams_policy_beats_cloning_of_the_same_labels_with_every_seed(env: str, labels: int) -> None:
    row = policy(env, "flam", labels)
    assert row["seeds"] == 3
    assert row["over_bc"]["low"] > 0  # of three seeds, the least


@pytest.mark.parametrize("env", ["grid", "bigfish"])
def test_a_thousand_labels_with_flam_are_nearly_as_good_as_all(env: str) -> None:
    few, every = policy(env, "flam", 1000), policy(env, "bc-all")
    assert every["seeds"] == 3
    assert few["return"]["mean"] >= 0.9 * every["return"]["mean"]


def test_the_returns_of_policies_are_those_of_their_games() -> None:
    cells = [json.loads(place.read_text()) for place in CELLS.glob("policy-*.json")]
    for row in committed("policy.json")["rows"]:
        mine = [cell for cell in cells if all(cell[key] == row[key] for key in ("env", "method", "labels"))]
        assert len(mine) == row["seeds"]
        assert all(cell["return"] == pytest.approx(statistics.mean(cell["returns"])) for cell in mine)
        assert row["return"]["mean"] == pytest.approx(statistics.mean(cell["return"] for cell in mine))


def factoring() -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["model"], row["agents"]): row for row in committed("factoring.json")["rows"]}


@pytest.mark.parametrize("agents", [2, 4, 8])
def test_flam_is_at_the_ceiling_whatever_the_number_of_agents(agents: int) -> None:
    row = factoring()["flam", agents]
    assert row["below_ceiling@1"]["mean"] <= 1
    assert row["below_ceiling@10"]["mean"] <= 1
    assert row["psnr@50"]["mean"] >= row["ceiling"]["mean"] - 3
    assert row["action_probe"]["mean"] >= 0.95
    assert row["leakage"] <= 0.05


def test_each_agent_has_a_slot_of_its_own_and_each_slot_one_agent() -> None:
    row = factoring()["flam", 4]
    assert row["seeds"] == 3
    assert row["dci"]["d"] >= 0.91
    assert row["dci"]["c"] >= 0.91
    assert row["dci"]["i"] >= 0.93


def test_one_latent_action_for_all_is_far_behind_where_many_act() -> None:
    rows = factoring()
    monolithic = [rows[model, 4]["psnr@10"]["mean"] for model in ("monolithic-gaussian", "monolithic-vq")]
    assert rows["flam", 4]["psnr@10"]["mean"] >= max(monolithic) + 15


def test_how_far_a_row_is_below_the_ceiling_is_what_its_trainings_say() -> None:
    for (model, agents), row in factoring().items():
        cells = [json.loads(place.read_text())["metrics"] for place in CELLS.glob(f"{model}-agents{agents}-seed*.json")]
        gaps = [one["ceiling/psnr@10"] - one["rollout/psnr@10"] for one in cells]
        assert row["seeds"] == len(cells)
        assert row["below_ceiling@10"]["mean"] == pytest.approx(sum(gaps) / len(gaps))
