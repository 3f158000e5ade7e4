"""What cannot work ends with one line that says what, where, why and what to do, with the documented exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs import train
from services.console import run_program
from tests.services.conftest import GRID, Cluster, environment, free_ports, run_id_of, run_job, said

SETTINGS, ENVIRONMENT, DATA = 2, 3, 4

pytestmark = pytest.mark.timeout(300)


def left_in(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def check_error(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> str:
    """One line on stderr, nothing else there; the line."""
    assert done.returncode == code, said(done)
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, said(done)
    assert lines[0].startswith("flam: error: ")
    assert "flam: error:" not in done.stdout
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    return lines[0]


def refuse(home: Path, code: int, arguments: list[str], *parts: str, **variables: str) -> str:
    """Run a job in `home` that must be refused and leave nothing behind; its one line."""
    before = left_in(home)
    line = check_error(run_job(arguments, environment(**variables), home), code, *parts)
    assert left_in(home) == before
    return line


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def data(grid_data: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to spoil."""
    return Path(shutil.copytree(grid_data, tmp_path / "data" / "grid"))


def a_train_shard(data: Path) -> Path:
    names = [s["name"] for s in json.loads((data / "manifest.json").read_text())["shards"] if s["split"] == "train"]
    return data / names[0]


def test_unknown_recipe(home: Path) -> None:
    refuse(home, SETTINGS, ["train", "smok"], "unknown recipe 'smok'", "Did you mean smoke?", "tiny")


def test_unknown_field(home: Path) -> None:
    done = run_job(["train", "smoke", "--flam-stage.stepz", "4"], environment(), home)
    assert done.returncode == SETTINGS, said(done)
    assert "Traceback" not in done.stdout + done.stderr
    words = " ".join(done.stderr.split())
    assert "--flam-stage.stepz" in words
    assert "--flam-stage.steps" in words.replace("_", "-"), said(done)  # did you mean
    assert not left_in(home)


def test_factors_that_do_not_divide_the_latent_width(home: Path) -> None:
    parts = ["model.latent_width 16", "model.factors 3", "Choose factors 2 or 4"]
    refuse(home, SETTINGS, ["train", "smoke", "--model.factors", "3"], *parts)


@pytest.mark.parametrize(
    ("code", "arguments", "parts"),
    [
        (SETTINGS, ["--tokenizer.frame_size", "50"], ["tokenizer.frame_size 50", "stride 8"]),
        (SETTINGS, ["--flam_stage.steps", "-1"], ["steps = -1", "must not be negative"]),
        (SETTINGS, ["--workers", "0"], ["workers = 0"]),
        (SETTINGS, ["--workers", "5"], ["batch_clips 4", "5 workers"]),
        (SETTINGS, ["--tokenizer.frame_size", "64"], ["48x48", "is 64", "--tokenizer.frame_size 48"]),
        (SETTINGS, ["--tracking", "ftp://mlflow"], ["ftp://mlflow", "sqlite:///"]),
        (SETTINGS, ["--storage", "gs://bucket/runs"], ["gs://bucket/runs", "s3://bucket/prefix"]),
        (DATA, ["--resume", "smoke-00000000"], ["smoke-00000000"]),
        (DATA, ["--flam_stage.batch_clips", "4000"], ["do not fill a batch of 4000", "batch_clips"]),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_settings_that_cannot_work(
    home: Path,
    grid_data: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    arguments: list[str],
    parts: list[str],
) -> None:
    """In this process, for starting the program takes longer than refusing does."""
    monkeypatch.chdir(home)
    for name in ("FLAM_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    words = ["smoke", "--data", str(grid_data), *arguments]
    with pytest.raises(SystemExit) as ended:
        run_program(train.Arguments, train.main, argv=words, default=train.from_recipe)
    said_so = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    check_error(subprocess.CompletedProcess(words, ended.value.code, said_so.out, said_so.err), code, *parts)
    assert not left_in(home)


def test_missing_data_set(home: Path) -> None:
    refuse(home, DATA, ["train", "smoke", "--data", "data/nothing"], str(home / "data/nothing"), "manifest.json")


def test_missing_shard(home: Path, data: Path) -> None:
    shard = a_train_shard(data)
    shard.unlink()
    refuse(home, DATA, ["train", "smoke", "--data", str(data)], f"shard {shard} is missing")


def test_shard_with_changed_bytes(home: Path, data: Path) -> None:
    shard = a_train_shard(data)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refuse(home, DATA, ["train", "smoke", "--data", str(data)], f"shard {shard} has changed", "sha256")


def test_no_clip_is_long_enough(home: Path, grid_data: Path) -> None:
    arguments = ["train", "smoke", "--data", str(grid_data), "--flam_stage.clip_frames", "100"]
    refuse(home, DATA, arguments, "no clip has 100 frames", "longest has 64", "clip_frames")


def test_no_mlflow_at_the_address(home: Path, grid_data: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    arguments = ["train", "smoke", "--data", str(grid_data), "--tracking", address]
    refuse(home, ENVIRONMENT, arguments, f"no MLflow server answers at {address}", "MLFLOW_TRACKING_URI")


def test_no_cluster_at_the_address(home: Path, grid_data: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    arguments = ["train", "smoke", "--data", str(grid_data), "--address", address]
    refuse(home, ENVIRONMENT, arguments, f"no Ray cluster at {address}", "--address or RAY_ADDRESS")


def test_debug_shows_where(home: Path) -> None:
    done = run_job(["ingest", "--world", "gird", "--out", "data/x", "--debug"], environment(), home)
    assert done.returncode == SETTINGS, said(done)
    assert "Traceback" in done.stderr
    assert "make_world" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("flam: error: worlds: there is no world 'gird'")


def test_unknown_world(home: Path) -> None:
    refuse(home, SETTINGS, ["ingest", "--world", "gird", "--out", "data/x"], "no world 'gird'", "Did you mean 'grid'?")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("agnets=3", ["no option 'agnets'", "Did you mean 'agents'?"]),
        ("agents", ["--option agents is not name=value"]),
        ("agents=many", ["agents"]),
        ("agents=99", ["agents = 99", "1 to 16"]),
        ("cells=7", ["frame_size 48", "multiple of 7"]),
    ],
)
def test_bad_world_option(home: Path, option: str, parts: list[str]) -> None:
    refuse(home, SETTINGS, ["ingest", *GRID[:4], "--option", option, "--out", "data/x"], *parts)


def test_neither_world_nor_videos(home: Path) -> None:
    refuse(home, SETTINGS, ["ingest", "--out", "data/x"], "--world or --videos")


def test_folder_without_videos(home: Path) -> None:
    (home / "videos").mkdir()
    (home / "videos" / "notes.txt").write_text("not a video\n")
    refuse(home, DATA, ["ingest", "--videos", "videos", "--out", "data/x"], "videos", "no video")


def test_missing_folder_of_videos(home: Path) -> None:
    refuse(home, DATA, ["ingest", "--videos", "videos", "--out", "data/x"], "videos")


def test_too_few_videos_names_each_reason(home: Path) -> None:
    (home / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (home / "videos" / name).write_text("a text file, renamed\n")
    line = refuse(home, DATA, ["ingest", "--videos", "videos", "--out", "data/x"], "0 usable episodes", "needs 3")
    assert "a.mp4: not a video" in line
    assert "b.mp4: not a video" in line


def test_another_data_set_in_the_way(home: Path, data: Path) -> None:
    before = left_in(data)
    arguments = ["ingest", *GRID, "--option", "cells=8", "--out", str(data)]
    refuse(home, DATA, arguments, f"another data set is at {data}", "overwrite")
    assert left_in(data) == before


def test_model_that_is_not_there(home: Path, grid_data: Path) -> None:
    refuse(
        home, DATA, ["evaluate", "--model", "outputs/latest", "--data", str(grid_data)], "no model at outputs/latest"
    )


@pytest.mark.timeout(600)
def test_clip_that_breaks_while_training(home: Path, data: Path, cluster: Cluster) -> None:
    """Found by a read task on the cluster, for one of two workers; reported as if it had been found at the start."""
    shard = a_train_shard(data)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    two = ("--workers", "2", "--worker_cpus", "0.5")
    done = run_job(cluster.arguments(data, "broken-clip", "--no-verify", *two), environment(), home)
    assert done.returncode == DATA, said(done)
    errors = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert len(errors) == 1, said(done)
    assert f"shard {shard.relative_to(data)}, clip grid-" in errors[0]
    assert "crc32" in errors[0]
    run = cluster.tracking.run(run_id_of(done.stdout), "broken-clip")
    assert run.info.status == "FAILED"
