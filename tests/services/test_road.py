"""The road: train on a cluster with an MLflow server, look at all that is left, load the model back, do it again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from PIL import Image

from flam_core.config_json import to_dict
from flam_core.recipes import smoke
from flam_core.steering.discovered import load_actions
from services.registry import download
from tests.services.conftest import REPOSITORY, Cluster, Tracking, Trained, environment, run_job, said, sha256

pytestmark = pytest.mark.timeout(600)

HORIZON = smoke().evaluation.horizon


@pytest.fixture(scope="module")
def measured(smoke_run: Trained) -> dict[str, float]:
    """The run's metrics.json."""
    return json.loads((smoke_run.outputs / "metrics.json").read_text())


@pytest.fixture(scope="module")
def tracked(smoke_run: Trained, mlflow_server: Tracking) -> mlflow.entities.Run:
    """The run in MLflow."""
    return mlflow_server.run(smoke_run.run_id, smoke_run.experiment)


def documented_keys() -> set[str]:
    """The keys that docs/metrics.md names in its tables, `@k` and `@<entity>` as they are written there."""
    return set(re.findall(r"^\| `([^`]+)` \|", (REPOSITORY / "docs" / "metrics.md").read_text(), re.MULTILINE))


def expected_keys() -> set[str]:
    """The documented keys of a rollout of `HORIZON` steps, without correspondence."""
    rollout = {key for key in documented_keys() if re.match(r"(rollout|shuffled|copy|ceiling)/.", key)}
    return {key.replace("@k", f"@{step}") for key in rollout for step in range(1, HORIZON + 1)}


def artifact_paths(tracking: Tracking, run_id: str, path: str | None = None) -> Iterator[str]:
    for item in tracking.client.list_artifacts(run_id, path):
        if item.is_dir:
            yield from artifact_paths(tracking, run_id, item.path)
        else:
            yield item.path


def test_outputs_have_a_report_with_pictures(smoke_run: Trained) -> None:
    outputs = smoke_run.outputs
    assert "<html" in (outputs / "report.html").read_text()
    with Image.open(outputs / "rollout.png") as picture:
        picture.verify()
    with Image.open(outputs / "rollout.gif") as film:
        assert film.n_frames == HORIZON + smoke().evaluation.context
    assert (smoke_run.home / "outputs" / "latest").resolve() == outputs.resolve()
    assert not list(outputs.rglob("*.part"))
    assert not list(outputs.rglob("*.tmp"))


def test_metrics_are_those_that_the_documentation_names(measured: dict[str, float]) -> None:
    rollouts = expected_keys()
    assert {f"{kind}/psnr@{k}" for kind in ("rollout", "copy", "shuffled") for k in (1, 10)} <= rollouts
    assert rollouts <= set(measured), f"missing: {sorted(rollouts - set(measured))}"
    assert {"dci/d", "dci/c", "dci/i", "dci/within"} <= set(measured)
    undocumented = {key for key in measured if general(key) not in documented_keys()}
    assert not undocumented, f"not in docs/metrics.md: {sorted(undocumented)}"


def general(key: str) -> str:
    """A key as docs/metrics.md writes it; of every key there may be one with its standard error."""
    at = "@<entity>" if key.startswith(("probe/", "action_probe/", "leakage")) else "@k"
    key = re.sub(r"_se(?=@|$)", "", key)
    return re.sub(r"^(slots|actions|leakage)/\d+/", r"\1/<i>/", re.sub(r"@\d+$", at, key))


def test_console_shows_the_result(smoke_run: Trained, measured: dict[str, float]) -> None:
    text = smoke_run.done.stdout
    assert f"{measured['rollout/psnr@10']:.2f} dB" in text
    assert str(smoke_run.outputs / "report.html") in text
    assert "Traceback" not in text + smoke_run.done.stderr


def test_mlflow_run_is_finished_with_all_settings(smoke_run: Trained, tracked: mlflow.entities.Run) -> None:
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == smoke_run.run_id

    def flat(values: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    params = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat(to_dict(smoke()))}
    assert tracked.data.params == params
    tags = tracked.data.tags
    assert tags["flam.run_id"] == smoke_run.run_id
    assert (tags["recipe"], tags["dataset"]) == ("smoke", "grid")
    assert tags["config_sha256"] == smoke().sha256()
    assert tags["run_folder"] == str(smoke_run.outputs)
    manifest = Path(tags["data"]) / "manifest.json"
    assert tags["manifest_sha256"] == sha256(manifest)
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", tags["git_commit"])


def test_mlflow_history_has_each_step_once(
    mlflow_server: Tracking, tracked: mlflow.entities.Run, measured: dict[str, float]
) -> None:
    history = mlflow_server.history(tracked)
    assert history["progress/step"] == [(50, 50.0)]
    for key, points in history.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), f"{key}: {steps}"
    assert {"flam/loss", "flam/kl", "speed/frames_per_second", "speed/data_wait_share"} <= set(history)
    for key, value in measured.items():
        assert history[key.replace("@", "_at_")] == [(0, pytest.approx(value))], key


def test_mlflow_has_the_report_but_no_checkpoints(
    smoke_run: Trained, mlflow_server: Tracking, tracked: mlflow.entities.Run, tmp_path: Path
) -> None:
    paths = set(artifact_paths(mlflow_server, tracked.info.run_id))
    assert {f"report/{name}" for name in ("report.html", "metrics.json", "rollout.png", "rollout.gif")} <= paths
    metrics = mlflow_server.client.download_artifacts(tracked.info.run_id, "report/metrics.json", str(tmp_path))
    assert sha256(Path(metrics)) == sha256(smoke_run.outputs / "metrics.json")
    heavy = {path for path in paths if "checkpoints" in path or path.endswith(".pt")}
    assert not heavy, f"checkpoints belong to the run's storage, not through the MLflow server: {sorted(heavy)}"


def test_what_slots_have_learnt_is_among_the_versions_artifacts(
    smoke_run: Trained, mlflow_server: Tracking, tmp_path: Path
) -> None:
    """And films are made with it, by default of the data that it was trained on."""
    command = ["generate", smoke_run.address, "--mode", "edit", "--slot", "1", "--code", "0", "--steps", "3"]
    env = environment(MLFLOW_TRACKING_URI=mlflow_server.uri)
    done = run_job([*command, "--out", str(tmp_path / "films")], env, tmp_path)
    assert done.returncode == 0, said(done)
    made = json.loads((tmp_path / "films" / "actions.json").read_text())
    assert made["weights_sha256"] == smoke_run.weights
    assert "data/grid, test clip 0" in made["source"]["clip"]
    assert {codes[1] for codes in made["films"][1]["codes"]} == {0}
    folder = download(smoke_run.address, mlflow_server.uri)
    found = load_actions(folder)
    assert found is not None
    assert found.slots == smoke().model.factors
    page = (folder / "microscope.html").read_text()
    assert page == (smoke_run.outputs / "microscope.html").read_text()
    assert smoke_run.run_id in page
    assert 'href="microscope.html"' in (smoke_run.outputs / "report.html").read_text()
    assert "(microscope.html)" in (folder / "README.md").read_text()


def test_registered_version_says_what_it_is(smoke_run: Trained, mlflow_server: Tracking, measured: dict) -> None:
    name, version = smoke_run.address.removeprefix("models:/").split("/")
    assert name == "flam-grid"
    found = mlflow_server.client.get_model_version(name, version)
    assert found.status == "READY"
    assert found.tags["weights_sha256"] == smoke_run.weights
    assert found.tags["config_sha256"] == smoke().sha256()
    assert found.tags["flam_run"] == smoke_run.run_id
    assert (len(found.tags["manifest_sha256"]), len(found.tags["sample_digest"])) == (64, 32)
    assert float(found.tags["rollout/psnr_at_10"]) == pytest.approx(measured["rollout/psnr@10"], abs=1e-4)


LOAD = """
import hashlib, sys
import flam_core
from flam_core.saved_model import weights_to_bytes
print(hashlib.sha256(weights_to_bytes(flam_core.load(sys.argv[1]))).hexdigest())
"""


@pytest.mark.parametrize("by", ["version", "alias"])
def test_model_loads_in_a_fresh_process_without_pickle(
    smoke_run: Trained, mlflow_server: Tracking, tmp_path: Path, by: str
) -> None:
    name, version = smoke_run.address.removeprefix("models:/").split("/")
    if by == "alias":  # other runs of the suite register versions of the same model: the newest has the alias
        version = mlflow_server.client.get_model_version_by_alias(name, "candidate").version
    address = smoke_run.address if by == "version" else f"models:/{name}@candidate"
    tags = mlflow_server.client.get_model_version(name, version).tags
    env = environment(MLFLOW_TRACKING_URI=mlflow_server.uri, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, address], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, said(done)
    assert done.stdout.split()[-1] == tags["weights_sha256"]


PREDICT = """
import sys
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
for clips, frames in ((1, 2), (3, 5)):
    video = np.random.default_rng(0).integers(0, 256, (clips, frames, 48, 48, 3), dtype=np.uint8)
    answer = model.predict(video)
    print(answer.dtype, answer.shape)
"""


def test_model_predicts_as_any_mlflow_model(smoke_run: Trained, mlflow_server: Tracking, tmp_path: Path) -> None:
    env = environment(MLFLOW_TRACKING_URI=mlflow_server.uri, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, smoke_run.address],
        env=env,
        cwd=tmp_path,  # flam_core comes from the model's own code
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, said(done)
    assert done.stdout.splitlines()[-2:] == ["uint8 (1, 1, 48, 48, 3)", "uint8 (3, 4, 48, 48, 3)"]


def test_registered_model_holds_no_pickle(smoke_run: Trained, mlflow_server: Tracking, tmp_path: Path) -> None:
    name, version = smoke_run.address.removeprefix("models:/").split("/")
    source = mlflow_server.client.get_model_version_download_uri(name, version)
    folder = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path), tracking_uri=mlflow_server.uri))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.name == "model.safetensors"]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".joblib")]
    starts = {path: path.read_bytes()[:2] for path in files}
    assert not [path for path, start in starts.items() if start in (b"\x80\x04", b"\x80\x05")]  # pickles by content


def test_evaluate_reproduces_the_metrics(
    smoke_run: Trained, mlflow_server: Tracking, grid_data: Path, measured: dict[str, float], tmp_path: Path
) -> None:
    config = smoke().evaluation
    arguments = ["evaluate", "--model", smoke_run.address, "--data", str(grid_data), "--out", "check"]
    arguments += ["--evaluation.clips", str(config.clips), "--evaluation.probe_clips", str(config.probe_clips)]
    done = run_job(arguments, environment(MLFLOW_TRACKING_URI=mlflow_server.uri), tmp_path)
    assert done.returncode == 0, said(done)
    again = json.loads((tmp_path / "check" / "metrics.json").read_text())
    assert again == pytest.approx(measured, rel=1e-3, abs=1e-3)
    assert (tmp_path / "check" / "report.html").is_file()


def test_same_command_again_changes_nothing(
    smoke_run: Trained, cluster: Cluster, tracked: mlflow.entities.Run, measured: dict[str, float]
) -> None:
    tracking = cluster.tracking
    name = smoke_run.address.removeprefix("models:/").split("/")[0]
    points = tracking.history(tracked)
    versions = {v.version for v in tracking.client.search_model_versions(f"name = '{name}'")}
    weights = smoke_run.weights
    checkpoints = (smoke_run.outputs / "checkpoints" / "index.json").read_text()

    done = run_job(smoke_run.arguments, environment(), smoke_run.home)

    assert done.returncode == 0, said(done)
    assert f"run {smoke_run.run_id} is trained already: step 50" in done.stdout
    assert "RayTrainWorker" not in done.stdout + done.stderr
    assert smoke_run.address in done.stdout
    assert smoke_run.weights == weights
    assert (smoke_run.outputs / "checkpoints" / "index.json").read_text() == checkpoints
    assert json.loads((smoke_run.outputs / "metrics.json").read_text()) == pytest.approx(measured, rel=1e-3, abs=1e-3)
    assert {v.version for v in tracking.client.search_model_versions(f"name = '{name}'")} == versions
    again = tracking.run(smoke_run.run_id, smoke_run.experiment)
    assert again.info.run_id == tracked.info.run_id
    assert again.info.status == "FINISHED"
    doubled = {key for key, now in tracking.history(again).items() if now != points.get(key)}
    assert not doubled, f"{len(doubled)} metrics were logged anew, such as {sorted(doubled)[:3]}"
