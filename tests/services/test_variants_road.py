"""Rivals on the same road: a model of true actions, and one that takes over another run's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch

from tests.services.conftest import Cluster, Trained, environment, run_job, said, train

pytestmark = pytest.mark.timeout(600)
SETTINGS = 2


@pytest.fixture(scope="module")
def true_actions(cluster: Cluster, grid_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    more = ("--variant", "true-actions", "--evaluation.during", "rollout", "10", "dci", "20")
    return train(cluster, tmp_path_factory.mktemp("true"), grid_data, "true-actions", *more)


@pytest.mark.slow
def test_a_model_of_true_actions_is_trained_on_what_the_data_hold(true_actions: Trained, cluster: Cluster) -> None:
    config = json.loads((true_actions.outputs / "config.json").read_text())["config"]
    assert config["variant"] == "true-actions"
    assert config["model"]["true_actions"] == [3, 1, 5]
    metrics = json.loads((true_actions.outputs / "metrics.json").read_text())
    assert "rollout/psnr@10" in metrics
    assert not [key for key in metrics if key.startswith(("dci/", "leakage", "action_probe/"))]
    assert cluster.tracking.run(true_actions.run_id, true_actions.experiment).data.tags["variant"] == "true-actions"


@pytest.mark.slow
def test_held_out_clips_are_measured_while_training_each_at_its_cadence(
    true_actions: Trained, cluster: Cluster
) -> None:
    history = cluster.tracking.history(cluster.tracking.run(true_actions.run_id, true_actions.experiment))
    first = 20  # steps of stage 1 in the recipe
    assert [step for step, _ in history["during/rollout/psnr_at_1"]] == [first + 10, first + 20, first + 30]
    assert "during/dci/i" not in history  # a model without slots has no correspondence to measure
    assert "held-out rollout/psnr@1" in true_actions.done.stdout


@pytest.mark.slow
def test_a_rival_takes_over_the_tokenizer_of_another_run(
    smoke_run: Trained, cluster: Cluster, grid_data: Path, tmp_path: Path
) -> None:
    more = ("--variant", "monolithic-vq", "--tokenizer_from", str(smoke_run.outputs))
    rival = train(cluster, tmp_path, grid_data, "taken-over", *more)
    config = json.loads((rival.outputs / "config.json").read_text())["config"]
    assert config["tokenizer_stage"]["steps"] == 0
    ours, theirs = (
        safetensors.torch.load_file(run.outputs / "model" / "model.safetensors") for run in (rival, smoke_run)
    )
    # But for the standardisation, which stage 2 sets from its own first batch.
    trained = [
        name for name in theirs if name.startswith(("tokenizer.encoder", "tokenizer.decoder", "tokenizer.to_codes"))
    ]
    assert trained
    assert all((ours[name] == theirs[name]).all() for name in trained)
    metrics = json.loads((rival.outputs / "metrics.json").read_text())
    assert metrics["ceiling/psnr"] == json.loads((smoke_run.outputs / "metrics.json").read_text())["ceiling/psnr"]


def test_a_variant_that_the_data_or_the_name_do_not_allow_is_refused(
    cluster: Cluster, grid_data: Path, tmp_path: Path
) -> None:
    done = run_job(cluster.arguments(grid_data, "wrong", "--variant", "grupped"), environment(), tmp_path)
    assert done.returncode == SETTINGS, said(done)
    assert "Did you mean grouped?" in done.stderr
    assert not (tmp_path / "outputs").exists()
