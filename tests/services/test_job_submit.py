"""`ray job submit` of the checkout: the same run as the direct command's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.conftest import REPOSITORY, Cluster, Trained, environment, run_id_of, said, sha256

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that git would carry, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def test_submitted_job_is_the_same_run(
    cluster: Cluster, smoke_run: Trained, grid_data: Path, checkout: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    job = ["python", "jobs/train.py", "smoke", "--data", str(grid_data), "--storage", str(storage)]
    job += ["--tracking", cluster.tracking.uri, "--experiment", "submitted"]
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.head.dashboard]

    done = subprocess.run(
        [*submit, "--working-dir", str(checkout), "--", *job],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert done.returncode == 0, said(done)
    assert re.search(r"Job '\S+' succeeded", done.stdout + done.stderr)
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert run_id_of(text) == smoke_run.run_id

    checkpoints = storage / smoke_run.run_id / "checkpoints"
    assert json.loads((checkpoints / "index.json").read_text())["steps"] == [40, 50]
    direct = smoke_run.outputs / "checkpoints" / "step-00000050" / "model.safetensors"
    assert sha256(checkpoints / "step-00000050" / "model.safetensors") == sha256(direct)

    run = cluster.tracking.run(smoke_run.run_id, "submitted")
    assert run.info.status == "FINISHED"
    versions = cluster.tracking.client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert [version.tags["weights_sha256"] for version in versions] == [smoke_run.weights]
    assert f"models:/{versions[0].name}/{versions[0].version}" in text
    report = cluster.tracking.client.download_artifacts(run.info.run_id, "report/metrics.json", str(tmp_path))
    measured = json.loads((smoke_run.outputs / "metrics.json").read_text())
    assert json.loads(Path(report).read_text()) == pytest.approx(measured, rel=1e-3, abs=1e-3)
