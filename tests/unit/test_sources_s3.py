"""Sources in a bucket give what they give on a local disk, and a bucket that fails is not taken for damaged data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem, copy_files

from flam_core.data.sources import SourceFlags, choose_source
from flam_core.errors import DataError, EnvironmentFault
from services.storage import resolve
from tests.sources_fixture import (
    CAMERAS,
    FS,
    episodes,
    make_lerobot,
    picture_rows,
    store,
    video_bytes,
    write_parquet,
    write_tar,
)


@pytest.fixture
def bucket(s3_server: Callable[[], str], tmp_path: Path) -> str:
    """A bucket with a folder for each source, and the same on the disk."""
    name = s3_server()
    clips = {f"{i}.mp4": video_bytes(one.frames) for i, one in enumerate(episodes(4))}
    write_tar(tmp_path / "in" / "webdataset" / "a.tar", clips)
    write_parquet(tmp_path / "in" / "parquet" / "a.parquet", picture_rows(episodes(4)))
    make_lerobot(tmp_path / "in" / "lerobot")
    remote, _ = FileSystem.from_uri(f"s3://{name}")
    copy_files(str(tmp_path / "in"), f"{name}/in", source_filesystem=FS, destination_filesystem=remote)
    return name


def flags(kind: str, address: str) -> SourceFlags:
    if kind == "webdataset":
        return SourceFlags(size=32, webdataset=f"{address}/*.tar")
    if kind == "parquet":
        return SourceFlags(size=32, parquet=address, image_fps=10.0)
    return SourceFlags(size=32, lerobot=address, camera=CAMERAS[0])


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "lerobot"])
def test_a_bucket_gives_what_a_disk_gives(bucket: str, tmp_path: Path, kind: str) -> None:
    near = store(choose_source(flags(kind, f"{tmp_path}/in/{kind}"), 0, resolve), tmp_path / "near")[0].manifest
    far = store(choose_source(flags(kind, f"s3://{bucket}/in/{kind}"), 0, resolve), tmp_path / "far")[0].manifest
    assert near == far


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "lerobot"])
def test_what_is_not_there_is_told(bucket: str, tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"none.*(does not exist|no tar|no Parquet|has no meta)"):
        store(choose_source(flags(kind, f"s3://{bucket}/none"), 0, resolve), tmp_path / "set")
    gone = choose_source(
        flags(kind, f"{bucket}-gone/in/{kind}"), 0, lambda path: _In(resolve(f"s3://{bucket}").fs, path)
    )
    with pytest.raises((EnvironmentFault, DataError), match=f"{bucket}-gone"):
        store(gone, tmp_path / "set")


class _In:
    def __init__(self, fs: FileSystem, path: str) -> None:
        self.fs, self.path = fs, path
