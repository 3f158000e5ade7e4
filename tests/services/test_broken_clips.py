"""Training on data of which a clip turns out to be broken: named and left out, or a stop with the list."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.manifest import read_manifest
from flam_core.data.shard import read_row_group
from tests.services.conftest import Cluster, environment, run_id_of, run_job, said

pytestmark = pytest.mark.timeout(600)

DATA = 4


@pytest.fixture
def spoilt(grid_data: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the data set with one byte changed in the payload of a train clip, and that clip's shard."""
    data = Path(shutil.copytree(grid_data, tmp_path / "data" / "grid"))
    shard = read_manifest(LocalFileSystem(), str(data)).split("train")[0]
    file = data / shard.name
    payload = read_row_group(LocalFileSystem(), str(file), 0).to_pylist()[3]["payload"]
    content = bytearray(file.read_bytes())
    content[content.index(payload) + len(payload) // 2] ^= 1
    file.write_bytes(bytes(content))
    return data, shard.name


def test_a_broken_clip_is_named_and_left_out(cluster: Cluster, spoilt: tuple[Path, str], tmp_path: Path) -> None:
    data, shard = spoilt
    more = ("--no-verify", "--max_bad_share", "0.1", "--workers", "2", "--worker_cpus", "0.5")
    done = run_job(cluster.arguments(data, "broken", *more), environment(), tmp_path)
    assert done.returncode == 0, said(done)
    (entry,) = json.loads((tmp_path / "outputs" / run_id_of(done.stdout) / "quarantine.json").read_text())
    assert (entry["data"], entry["shard"], entry["row"]) == (str(data), shard, 3)
    assert "crc32" in entry["reason"]
    assert "1 broken clips were left out" in done.stdout


def test_more_than_the_share_stops_with_the_list(cluster: Cluster, spoilt: tuple[Path, str], tmp_path: Path) -> None:
    data, shard = spoilt
    done = run_job(cluster.arguments(data, "broken-2", "--no-verify", "--max_bad_share", "0"), environment(), tmp_path)
    assert done.returncode == DATA, said(done)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert "1 of 40 clips are broken" in line
    assert shard in line
    assert "--verify" in line


@pytest.mark.slow
def test_what_verify_names_is_left_out_from_the_start(
    cluster: Cluster, spoilt: tuple[Path, str], tmp_path: Path
) -> None:
    data, _ = spoilt
    done = run_job(cluster.arguments(data, "broken-3"), environment(), tmp_path)
    assert done.returncode == DATA, said(done)
    assert "sha256" in done.stderr
    verified = run_job(["ingest", "--verify", str(data), "--max_bad_share", "0.1"], environment(), tmp_path)
    assert verified.returncode == 0, said(verified)
    done = run_job(cluster.arguments(data, "broken-3", "--max_bad_share", "0.1"), environment(), tmp_path)
    assert done.returncode == 0, said(done)
    assert not (tmp_path / "outputs" / run_id_of(done.stdout) / "quarantine.json").exists()
