"""What a user has when a command of the docs is run: each name is what a marker says with `given`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyarrow.fs import LocalFileSystem

from tests.docs.commands import REPOSITORY

LINKED = ("jobs", "infra", "constraints.txt", "Makefile")
"""Of the repository, as a user who stands in a checkout has them."""


def make_home(home: Path, given: list[str]) -> Path:
    """An empty home that has these, in which the repository's programs are found as in a checkout."""
    home.mkdir()
    for name in LINKED:
        (home / name).symlink_to(REPOSITORY / name)
    for name in given:
        GIVEN[name](home)
    return home


def _clips(home: Path) -> None:
    from tests.videos_fixture import encode_video, video_frames

    for seed in range(10):
        encode_video(home / "clips" / f"{seed}.mp4", video_frames(24, seed, agents=2))


def _ingested_clips(home: Path) -> None:
    from flam_core.data.ingest import ingest_folder
    from flam_core.data.videos import VideoOptions

    _clips(home)
    video = VideoOptions(size=48)
    ingest_folder(home / "clips", LocalFileSystem(), str(home / "data/clips"), video=video, name="clips")


def _tables(home: Path) -> None:
    from tests.sources_fixture import episodes, picture_rows, video_bytes, write_parquet

    recorded = episodes(6)
    write_parquet(home / "tables/videos.parquet", [{"mp4": video_bytes(one.frames)} for one in recorded])
    rows = [
        {"left": row["image"], "run": row["episode_index"], "n": row["frame_index"]} for row in picture_rows(recorded)
    ]
    write_parquet(home / "frames/pictures.parquet", rows)


def _lerobot(home: Path) -> None:
    from tests.sources_fixture import make_lerobot

    make_lerobot(home / "aloha")


def _archives(home: Path) -> None:
    from tests.sources_fixture import episodes, video_bytes, write_tar

    for number in range(2):
        members = {f"ep{i}.mp4": video_bytes(one.frames) for i, one in enumerate(episodes(4))}
        write_tar(home / f"tars/train-{number}.tar", members)


def _grid(home: Path) -> None:
    from flam_core.data.ingest import ingest_world
    from flam_core.worlds.grid import GridWorld

    world = GridWorld(agents=3, cells=6, walls=3, frame_size=48)
    ingest_world(world, LocalFileSystem(), str(home / "data/grid"), episodes=60, frames=64, name="grid")


def _model(home: Path) -> None:
    from flam_core.saved_model import save_model
    from tests.evaluation_fixture import small_flam

    save_model(small_flam(), home / "outputs/latest/model", "# A model for tests\n")


def _picture(home: Path) -> None:
    from PIL import Image

    from tests.videos_fixture import video_frames

    Image.fromarray(video_frames(1)[0]).save(home / "picture.png")


GIVEN: dict[str, Callable[[Path], None]] = {
    "~/clips": _clips,
    "data/clips": _ingested_clips,
    "~/tables": _tables,
    "~/aloha": _lerobot,
    "~/tars": _archives,
    "data/grid": _grid,
    "outputs/latest": _model,
    "picture.png": _picture,
}
