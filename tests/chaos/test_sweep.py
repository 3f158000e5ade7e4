"""A sweep whose driver is killed twice: each trial is trained once, and MLflow shows each once."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.services.conftest import Cluster, environment, kill_when, run_job, said

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(1500)]

SPACE = ("--factors", "2,4", "--codebook", "0,4", "--evaluations", "5", "--grace", "0.6")
TRIALS = {
    f"k{factors}-{latent}-w{8 * factors}-b0.0002-fsq4x4x4x4x4-seed0"
    for factors in (2, 4)
    for latent in ("gaussian", "vq4")
}


@dataclass(frozen=True)
class Swept:
    """A sweep that came to its end after two kills."""

    home: Path
    arguments: list[str]
    done: subprocess.CompletedProcess[str]
    at_kills: list[dict[str, bytes]]
    """The records there were when its driver was killed."""

    @property
    def folder(self) -> Path:
        (found,) = (self.home / "outputs" / "sweeps").iterdir()
        return found

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "sweep.json").read_text())


def records(home: Path) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in home.glob("outputs/sweeps/*/trials/*.json")}


@pytest.fixture(scope="module")
def swept(cluster: Cluster, grid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    home = tmp_path_factory.mktemp("sweep")
    _, *rest = cluster.arguments(grid_data, "sweep", *SPACE, "--worker_cpus", "0.5", "--at_a_time", "1")
    arguments = ["tune", *rest]
    at_kills = []
    for count in (1, 2):  # in the midst of the next one
        kill_when(arguments, environment(), home, lambda count=count: under_way(home, count), 500)
        at_kills.append(records(home))
    done = run_job(arguments, environment(), home)
    assert done.returncode == 0, said(done)
    return Swept(home, arguments, done, at_kills)


def under_way(home: Path, ended: int) -> bool:
    """So many trials have ended, and the next has a run that was begun."""
    known = {json.loads(content)["run_id"] for content in records(home).values()}
    begun = {place.parent.parent.name for place in home.glob("outputs/smoke-*/journal/*.jsonl")}
    tokenizers = {place.parent.parent.name for place in home.glob("outputs/smoke-*/reconstruction.png")}
    return len(known) >= ended and len(begun - known - tokenizers - {"latest"}) >= 1


def test_each_trial_was_trained_once(swept: Swept) -> None:
    rows = swept.results["trials"]
    assert {row["name"] for row in rows} == TRIALS
    assert len({row["run"] for row in rows}) == 4
    for known in swept.at_kills:  # what had ended was not touched again
        assert known.items() <= records(swept.home).items()
    assert all(row["seconds"] > 0 for row in rows)
    assert {"factors", "codebook", "seed", "metrics", "seconds", "stopped_by"} <= set(rows[0])


def test_mlflow_shows_a_parent_and_each_trial_below_it_once(swept: Swept, cluster: Cluster) -> None:
    tracking = cluster.tracking
    client = tracking.client
    experiment = client.get_experiment_by_name("sweep")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == len(runs) - 1 == 5  # four trials and the tokenizer that they share
    assert parents[0].data.tags["best"]
    version = client.get_model_version_by_alias("flam-grid", "candidate")
    assert parents[0].data.tags["candidate"] == f"models:/flam-grid/{version.version}"
    assert version.tags["flam_run"] in {row["run"] for row in swept.results["trials"]}
    for row in swept.results["trials"]:
        (run,) = [one for one in children if one.data.tags["flam.run_id"] == row["run"]]
        assert run.info.status == ("FINISHED" if row["stopped_by"] is None else "KILLED")
        for key, points in tracking.history(run).items():
            if key.startswith("flam/"):
                steps = [step for step, _ in points]
                assert steps == sorted(set(steps)), key


def test_asha_stopped_only_what_was_worse_than_the_median(swept: Swept) -> None:
    rows = swept.results["trials"]
    metric = swept.results["objectives"][0]["metric"]
    stopped = [row for row in rows if row["stopped_by"] == "asha"]
    for row in stopped:
        score = row["looks"][-1]["metrics"][metric]
        others = [
            look["metrics"][metric]
            for one in rows
            if one is not row
            for look in one["looks"]
            if look["step"] == row["steps"]
        ]
        assert any(other > score for other in others)
        assert row["steps"] < swept.results["steps"]
    assert len(stopped) < len(rows)


def test_the_report_is_there(swept: Swept) -> None:
    names = {place.name for place in swept.folder.iterdir()}
    assert {
        "report.html",
        "sweep.json",
        "surface.png",
        "pareto.png",
        "parallel.png",
        "curves.png",
        "costs.png",
    } <= names
    assert "What to try next" in (swept.folder / "report.html").read_text()
    assert {f"{name}.txt" for name in TRIALS} == {place.name for place in (swept.folder / "logs").iterdir()}


def test_the_same_command_again_changes_nothing(swept: Swept, cluster: Cluster) -> None:
    before = records(swept.home), swept.results
    done = run_job(swept.arguments, environment(), swept.home)
    assert done.returncode == 0, said(done)
    assert (records(swept.home), swept.results) == before
