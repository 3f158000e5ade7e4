"""A folder of a user's own videos, good and bad ones, to a report."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.conftest import Cluster, Trained, environment, run_job, said, train
from tests.videos_fixture import OK, make_video_folder

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Ingested:
    """The folder's fate."""

    data: Path
    expected: dict[str, str]
    """"ok", or a part of the reason why a file is bad."""
    done: subprocess.CompletedProcess[str]

    @property
    def bad(self) -> dict[str, str]:
        return {name: reason for name, reason in self.expected.items() if reason != OK}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    home = tmp_path_factory.mktemp("videos")
    expected = make_video_folder(home / "my videos")
    arguments = ["ingest", "--videos", "my videos", "--size", "48", "--out", "data/clips", "--licence", "CC0-1.0"]
    return Ingested(home / "data" / "clips", expected, run_job(arguments, environment(), home))


def test_good_videos_go_through(ingested: Ingested) -> None:
    assert ingested.done.returncode == 0, said(ingested.done)
    manifest = json.loads((ingested.data / "manifest.json").read_text())
    assert sum(manifest["episodes"].values()) == len(ingested.expected) - len(ingested.bad)
    assert manifest["frame_size"] == [48, 48]
    assert not manifest["has_truth"]
    assert (manifest["name"], manifest["licence"]) == ("clips", "CC0-1.0")


def test_each_bad_video_is_named_with_its_reason(ingested: Ingested) -> None:
    listed = {
        entry["path"]: entry["reason"]
        for entry in json.loads((ingested.data / "quarantine.json").read_text())["sources"]
    }
    assert set(listed) == set(ingested.bad)
    shown = [line for line in ingested.done.stdout.splitlines() if line.startswith("left out: ")]
    assert len(shown) == len(ingested.bad)
    for name, reason in ingested.bad.items():
        assert reason in listed[name]
        assert f"left out: {name}: {listed[name]}" in shown
    assert "Traceback" not in ingested.done.stdout + ingested.done.stderr


@pytest.fixture(scope="module")
def trained(ingested: Ingested, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(cluster, tmp_path_factory.mktemp("train-videos"), ingested.data, "videos")


def test_videos_train_to_a_report_without_correspondence(trained: Trained) -> None:
    metrics = json.loads((trained.outputs / "metrics.json").read_text())
    assert {"rollout/psnr@1", "rollout/psnr@10", "copy/psnr@10", "ceiling/psnr"} <= set(metrics)
    assert not [key for key in metrics if key.startswith(("dci/", "probe/"))]
    page = (trained.outputs / "report.html").read_text()
    assert "No DCI: no train clip has ground-truth positions" in page
    assert "DCI" not in trained.done.stdout


def test_model_of_videos_is_registered_under_their_name(trained: Trained, cluster: Cluster) -> None:
    assert trained.address == "models:/flam-clips/1"
    tags = cluster.tracking.client.get_model_version("flam-clips", "1").tags
    assert tags["weights_sha256"] == trained.weights
    assert not [key for key in tags if key.startswith("dci")]
