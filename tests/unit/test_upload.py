"""What a job would send is known beforehand, file by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from flam_core.errors import SettingsError
from services.submit import check_upload, uploaded_files

MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Code, data that ignore files name, and what Ray leaves out by itself."""
    for name, size in {
        "jobs/train.py": 1000,
        "data/shard.parquet": 3 * MIB,
        "data/keep.txt": 10,
        "notes/old/film.mp4": 2 * MIB,
        "weights.bin": MIB,
        ".git/pack": 5 * MIB,
        ".venv/lib/torch.so": 5 * MIB,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".gitignore").write_text("*.parquet\n")
    (tmp_path / "notes" / ".rayignore").write_text("old/\n")
    return tmp_path


def test_ignore_files_count_in_every_folder(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in uploaded_files(folder)}
    assert names == {"jobs/train.py", "data/keep.txt", "weights.bin", ".gitignore", "notes/.rayignore"}


def test_the_size_is_what_is_sent(folder: Path) -> None:
    assert check_upload(folder) == pytest.approx(1.0, abs=0.01)


def test_too_much_names_the_largest_files(folder: Path) -> None:
    (folder / ".gitignore").unlink()
    with pytest.raises(
        SettingsError,
        match=r"would send 4\.0 MiB .* limit is 2 MiB.* data/shard\.parquet \(3\.0 MiB\), weights\.bin \(1\.0 MiB\), .*"
        r"\.rayignore",
    ):
        check_upload(folder, 2)


def test_a_link_that_leads_nowhere_is_passed_over(folder: Path) -> None:
    (folder / "dangling").symlink_to("nothing")
    assert check_upload(folder) == pytest.approx(1.0, abs=0.01)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a folder"):
        check_upload(tmp_path / "none")
