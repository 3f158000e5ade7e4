"""Killed with SIGKILL, run again: the same weights, bit for bit, and each step in MLflow exactly once."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.conftest import (
    RESUME_SETTINGS,
    RESUME_STEPS,
    Cluster,
    Trained,
    committed,
    environment,
    kill_when,
    run_id_of,
    run_job,
    said,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SETTINGS = 2


@dataclass(frozen=True)
class Broken:
    """A run that was killed twice, with a checkpoint damaged in between, and then came to its end."""

    trained: Trained
    committed_at_kill: tuple[list[int], list[int]]
    """What `index.json` named when it was killed."""
    damaged: int
    """Step of the checkpoint that was damaged after the first kill."""
    second: str
    """What the second attempt printed."""


@pytest.fixture(scope="module")
def broken(
    unbroken_run: Trained, cluster: Cluster, grid_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Broken:
    """Kill, damage the newest checkpoint, go on, kill, go on to the end."""
    home = tmp_path_factory.mktemp("broken")
    arguments = cluster.arguments(grid_data, "broken", *RESUME_SETTINGS, "--chaos", "slow:0")  # time to be killed in
    checkpoints = home / "outputs" / unbroken_run.run_id / "checkpoints"
    index = checkpoints / "index.json"

    kill_when(arguments, environment(), home, lambda: len(committed(index)) >= 2)
    first = committed(index)
    truncate(checkpoints / f"step-{first[-1]:08d}" / "model.safetensors")

    # It stands still near its end, since what workers print may come late.
    waits = [*arguments[:-1], f"slow:0,hang@{RESUME_STEPS - 60}"]
    second = kill_when(waits, environment(), home, lambda: max(committed(index)) > first[-1], printed="resumed at step")
    then = committed(index)

    done = run_job(arguments, environment(), home)
    assert done.returncode == 0, said(done)
    trained = Trained(home, "broken", run_id_of(done.stdout), tuple(arguments), done)
    return Broken(trained, (first, then), first[-1], second)


def truncate(path: Path) -> None:
    """As a full disk or a broken copy leaves a file."""
    os.truncate(path, path.stat().st_size // 2)


def resumed_at(text: str) -> list[int]:
    return [int(step) for step in re.findall(rf"resumed at step (\d+) of {RESUME_STEPS}", text)]


def test_damaged_checkpoint_is_passed_over_with_a_word(broken: Broken) -> None:
    good, damaged = broken.committed_at_kill[0]
    assert re.search(
        rf"checkpoint \S+step-{damaged:08d} is damaged \(model.safetensors\) and is passed over", broken.second
    )
    assert resumed_at(broken.second) == [good]


def test_second_attempt_committed_the_damaged_step_again(broken: Broken) -> None:
    first, then = broken.committed_at_kill
    assert max(then) > max(first)


def test_run_goes_on_from_the_newest_commit(broken: Broken) -> None:
    text = broken.trained.done.stdout
    assert resumed_at(text) == [max(broken.committed_at_kill[1])], said(broken.trained.done)
    assert "passed over" not in text


def test_killed_run_ends_with_the_weights_of_the_unbroken_one(broken: Broken, unbroken_run: Trained) -> None:
    assert broken.trained.run_id == unbroken_run.run_id
    assert "resumed" not in unbroken_run.done.stdout
    assert broken.trained.weights == unbroken_run.weights
    assert meta(broken.trained) == meta(unbroken_run)  # the digest of all samples consumed is in it


def meta(trained: Trained) -> dict[str, object]:
    folder = trained.outputs / "checkpoints" / f"step-{RESUME_STEPS:08d}"
    return json.loads((folder / "meta.json").read_text())


def test_only_the_newest_checkpoints_are_kept(broken: Broken) -> None:
    checkpoints = broken.trained.outputs / "checkpoints"
    assert committed(checkpoints / "index.json") == [RESUME_STEPS - 50, RESUME_STEPS]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["index.json", "step-00000200", "step-00000250"]


def test_history_is_that_of_the_unbroken_run(broken: Broken, unbroken_run: Trained, cluster: Cluster) -> None:
    tracking = cluster.tracking
    histories = {}
    for trained in (broken.trained, unbroken_run):
        run = tracking.run(trained.run_id, trained.experiment)
        assert run.info.status == "FINISHED"
        found = tracking.history(run)
        # What the machines did, and when: each attempt has its own.
        histories[trained.experiment] = {k: v for k, v in found.items() if not k.startswith(("system/", "goodput/"))}
    there, here = histories["unbroken"], histories["broken"]
    assert set(here) == set(there)
    assert [step for step, _ in here["progress/step"]] == [50, 100, 150, 200, 250]
    for key, points in here.items():
        if key.startswith(("speed/", "feed/")):  # how fast, and what was read since the start: not the run's outcome
            assert [step for step, _ in points] == [step for step, _ in there[key]], key
        else:
            assert points == there[key], key


def test_damaged_final_checkpoint_is_trained_again(broken: Broken, unbroken_run: Trained, tmp_path: Path) -> None:
    home = Path(shutil.copytree(broken.trained.home, tmp_path / "home", symlinks=True))
    outputs = home / "outputs" / broken.trained.run_id
    truncate(outputs / "checkpoints" / f"step-{RESUME_STEPS:08d}" / "model.safetensors")
    shutil.rmtree(outputs / "model")

    done = run_job(broken.trained.arguments, environment(), home)

    assert done.returncode == 0, said(done)
    assert "passed over" in done.stdout
    again = Trained(home, "broken", broken.trained.run_id, broken.trained.arguments, done)
    assert again.weights == unbroken_run.weights, f"the model is not that of step {RESUME_STEPS}\n{said(done)}"
    assert broken.trained.address == again.address
    assert resumed_at(done.stdout) == [RESUME_STEPS - 50]


@pytest.fixture
def copied(unbroken_run: Trained, tmp_path: Path) -> Path:
    """A copy of the unbroken run's folder that another command may spoil; its home."""
    target = tmp_path / "home" / "outputs" / unbroken_run.run_id
    shutil.copytree(unbroken_run.outputs, target)
    return tmp_path / "home"


def test_folder_of_another_config_is_refused(unbroken_run: Trained, copied: Path) -> None:
    place = copied / "outputs" / unbroken_run.run_id / "config.json"
    content = json.loads(place.read_text())
    content["config"]["flam_stage"]["learning_rate"] = 0.25
    content["config"]["model"]["blocks"] = 7
    place.write_text(json.dumps(content))

    done = run_job(unbroken_run.arguments, environment(), copied)

    assert done.returncode == SETTINGS, said(done)
    errors = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert len(errors) == 1, said(done)
    assert "flam_stage.learning_rate (0.25 there, 0.001 here)" in errors[0]
    assert "model.blocks (7 there, 1 here)" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads(place.read_text()) == content


def test_resume_by_id_with_another_setting_is_refused(unbroken_run: Trained, copied: Path) -> None:
    places = [*unbroken_run.arguments[2 : unbroken_run.arguments.index(RESUME_SETTINGS[0])]]
    done = run_job(
        ["train", *places, "--resume", unbroken_run.run_id, "--flam_stage.learning_rate", "0.5"], environment(), copied
    )
    assert done.returncode == SETTINGS, said(done)
    assert "flam_stage.learning_rate (0.001 there, 0.5 here)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_resume_by_id_takes_the_settings_of_the_run(unbroken_run: Trained, cluster: Cluster, copied: Path) -> None:
    places = [*unbroken_run.arguments[2 : unbroken_run.arguments.index(RESUME_SETTINGS[0])]]
    done = run_job(["train", *places, "--resume", unbroken_run.run_id], environment(), copied)
    assert done.returncode == 0, said(done)
    assert f"run {unbroken_run.run_id} is trained already: step {RESUME_STEPS}" in done.stdout
    assert unbroken_run.address in done.stdout
