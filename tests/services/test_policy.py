"""The policy protocol: each cell is done once, a stopped run goes on, and the table says what came of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.saved_model import save_model
from services.policy import PolicySettings, evidence, policy_cells, with_model
from services.study.tasks import ray_for
from tests.services.conftest import environment, run_job, said
from tests.steering_fixture import steered

pytestmark = pytest.mark.timeout(600)
SIZES = ("--recipe", "smoke", "--tokenizer_steps", "8", "--steps", "8", "--episodes", "40", "--frames", "32")
PLAY = ("--games", "4", "--seeds", "2", "--policy.steps", "20", "--policy.channels", "8", "16")
POLICY = ["policy", *SIZES, *PLAY]


@pytest.mark.slow
@pytest.mark.long
def test_the_protocol_runs_goes_on_and_writes_its_table(tmp_path: Path) -> None:
    env = environment()
    first = run_job([*POLICY, "--labels", "100", "--methods", "flam", "random"], env, tmp_path)
    assert first.returncode == 0, said(first)
    folder = tmp_path / "outputs/policy"
    before = {place: place.read_bytes() for place in (folder / "cells").iterdir()}
    models = {place: place.stat().st_mtime_ns for place in folder.glob("models/*/model.safetensors")}
    assert len(before) == 4
    assert len(models) == 2  # one a seed
    second = run_job([*POLICY, "--labels", "100", "300"], env, tmp_path)
    assert second.returncode == 0, said(second)
    assert "4 of 14 cells are done already" in second.stdout
    after = {place: place.read_bytes() for place in (folder / "cells").iterdir()}
    assert len(after) == 14
    assert before.items() <= after.items()
    assert models == {place: place.stat().st_mtime_ns for place in folder.glob("models/*/model.safetensors")}
    assert len(list((folder / "data").iterdir())) == 1

    written = json.loads((tmp_path / "docs/results/policy.json").read_text())
    rows = written["rows"]
    place = next((folder / "data").iterdir())
    data = written["expert_data"]["grid"]
    assert data["manifest_sha256"] == hashlib.sha256((place / "manifest.json").read_bytes()).hexdigest()
    assert data["episodes"] == 40
    assert data["return"]["mean"] > 1
    assert set(written["flam_seconds"]["grid"]) == {"0", "1"}
    assert min(written["flam_seconds"]["grid"].values()) > 0
    assert written["git_commit"]
    assert written["model"] is None
    assert [(row["method"], row["labels"]) for row in rows] == [
        *(("flam", 100), ("flam", 300), ("bc", 100), ("bc", 300)),
        *(("bc-all", None), ("expert", None), ("random", None)),
    ]
    cells = [json.loads(text) for text in after.values()]
    for row in rows:
        mine = [c for c in cells if (c["method"], c["labels"]) == (row["method"], row["labels"])]
        returns = [sum(cell["returns"]) / 4 for cell in mine]
        assert row["env"] == "grid"
        assert row["seeds"] == row["return"]["n"] == len(returns) == 2
        assert row["return"]["mean"] == pytest.approx(sum(returns) / 2)
        assert row["return"]["se"] == pytest.approx(abs(returns[0] - returns[1]) / 2)
        assert (row["label_accuracy"] is None) == (row["method"] != "flam")
    by_name = {(row["method"], row["labels"]): row for row in rows}
    gain = by_name["flam", 300]["return"]["mean"] - by_name["bc", 300]["return"]["mean"]
    assert by_name["flam", 300]["over_bc"]["mean"] == pytest.approx(gain)
    assert by_name["expert", None]["return"]["mean"] > 4 * by_name["random", None]["return"]["mean"]
    assert "| grid | 300 | flam | 2 |" in (tmp_path / "docs/results/policy.md").read_text()
    assert (tmp_path / "docs/results/policy.png").read_bytes().startswith(b"\x89PNG")

    model = next(iter(models)).parent
    given = ["--model", str(model), "--labels", "100", "--methods", "flam", "--seeds", "1", "--out", "given"]
    third = run_job([*POLICY, *given], env, tmp_path)
    assert third.returncode == 0, said(third)
    assert len(list(folder.glob("models/*"))) == 2  # none was trained
    (row,) = json.loads((tmp_path / "given/policy.json").read_text())["rows"]
    (cell,) = [c for c in cells if (c["method"], c["labels"], c["seed"]) == ("flam", 100, int(model.name[9]))][:1]
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    used = json.loads((tmp_path / "given/policy.json").read_text())["model"]
    assert used == {"address": str(model), "version": None, "weights_sha256": weights}
    if cell["seed"] == 0:  # the same weights, labels and seed
        assert row["return"]["mean"] == pytest.approx(cell["return"])


def test_an_alias_is_asked_for_once(tmp_path: Path) -> None:
    client = mlflow.MlflowClient(tracking := f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model("flam-grid")
    for version in ("1", "2"):
        save_model(steered(blocks=int(version)), tmp_path / version, "card")
        client.create_model_version("flam-grid", (tmp_path / version).as_uri())
    client.set_registered_model_alias("flam-grid", "champion", "1")
    given = PolicySettings(
        model="models:/flam-grid@champion", tracking=tracking, folder=str(tmp_path / "out"), labels=(100,)
    )
    settings = with_model(given)
    client.set_registered_model_alias("flam-grid", "champion", "2")
    assert settings.model is not None
    meant = hashlib.sha256((tmp_path / "1" / "model.safetensors").read_bytes()).hexdigest()
    found = evidence(settings, policy_cells(replace(settings, methods=("flam",), seeds=1)))["model"]
    assert found == {"address": given.model, "version": "1", "weights_sha256": meant}
    assert with_model(settings) == settings
    assert evidence(with_model(given), ())["model"]["version"] == "2"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"envs": ("maze",)}, "Choose of grid, bigfish, starpilot"),
        ({"methods": ("ppo",)}, "Choose of flam, bc"),
        ({"labels": (1000,), "episodes": 40, "frames": 32}, "1000 labels, but grid has at most 992"),
        ({"labels": (10,)}, "at least 50"),
        ({"window": -1}, "window = -1"),
        ({"play_steps": -5}, "play_steps = -5. It must be at least 1"),
        ({"play_steps": 0}, "play_steps = 0"),
        ({"episodes": -40}, "episodes = -40"),
        ({"episodes": 0}, "episodes = 0"),
        ({"frames": 0}, "frames = 0"),
        ({"frames": 1}, "frames = 1. It must be at least 2"),
        ({"factors": 0}, "factors = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"tokenizer_steps": -1}, "tokenizer_steps = -1"),
        ({"gpus": -1.0}, "gpus = -1. A training takes 0 to 1"),
        ({"gpus": 1.5}, "gpus = 1.5"),
        ({"labels": (1000, 1000)}, "--labels 1000 1000. Name each once"),
        ({"envs": ("grid", "grid")}, "--envs grid grid"),
        ({"methods": ("bc", "random", "bc")}, "--methods bc random bc"),
        ({"walls": 20}, "goal: 20 walls"),
    ],
)
def test_settings_that_cannot_work_are_refused(sizes: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        policy_cells(PolicySettings(**sizes))


def test_a_model_that_is_not_there_ends_the_program_before_anything_starts(tmp_path: Path) -> None:
    done = run_job([*POLICY, "--labels", "100", "--model", "nowhere"], environment(), tmp_path)
    assert done.returncode == 4, said(done)
    assert "no model at nowhere" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_tasks_that_no_node_can_run_end_the_program_instead_of_waiting(tmp_path: Path) -> None:
    # Ray would let them wait for ever; on a machine with GPUs it sees none.
    few = ["--labels", "100", "--methods", "bc", "--seeds", "1", "--gpus", "1"]
    done = run_job([*POLICY, *few], environment(CUDA_VISIBLE_DEVICES=""), tmp_path, seconds=150)
    assert done.returncode == 3, said(done)
    assert "a task needs 1 CPUs and 1 GPUs of one node, and none has them: the cluster has 2 CPUs and 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs/policy/data").exists()


def test_a_task_must_fit_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(cpus: float, gpus: float, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}

    nodes = [node(4, 0), node(2, 1), node(16, 8, alive=False)]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0, "GPU": 1.0})
    for cpus, gpus in ((4, 0), (2, 1), (1, 0.5)):
        with ray_for(None, 2, cpus=cpus, gpus=gpus):
            pass
    for cpus, gpus in ((6, 0), (4, 1), (1, 2)):
        with (
            pytest.raises(EnvironmentFault, match=rf"needs {cpus} CPUs and {gpus} GPUs .* 6 CPUs and 1 GPUs in all"),
            ray_for(None, 2, cpus=cpus, gpus=gpus),
        ):
            pass
