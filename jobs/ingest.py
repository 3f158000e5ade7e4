"""Make a data set (manifest + shards) of videos or of a built-in world.

    python jobs/ingest.py --world grid --out data/grid --size 64 --episodes 800
    python jobs/ingest.py --world grid --option agents=3 --option cells=6 --size 48 --out s3://bucket/grid
    python jobs/ingest.py --videos ~/clips --size 128 --fit crop --fps 10 --out data/clips

Worlds: grid, and with `make worlds` multigrid, bigfish, leaper, starpilot, driving. Files that cannot be used are
named with the reason, here and in the data set's quarantine.json; the rest goes through.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/ingest.py` puts only jobs/ on the path

from flam_core.data.ingest import IngestOptions, IngestReport, ingest_folder, ingest_world
from flam_core.data.videos import VideoOptions
from flam_core.errors import SettingsError
from flam_core.worlds import make_world
from services.console import Progress, run_program, table
from services.storage import resolve


@dataclass(frozen=True)
class Arguments:
    """What `jobs/ingest.py` takes."""

    out: str
    """Where the data set goes: a folder or s3://bucket/prefix."""
    world: str | None = None
    """A built-in world to record."""
    videos: Path | None = None
    """A folder of video files (MP4, MKV, WebM, AVI, MOV, GIF; searched through)."""
    name: str | None = None
    """Of the data set, and so of its models (flam-NAME); default: the last part of --out."""
    size: int = 64
    """Height and width of the stored frames in pixels."""
    episodes: int = 800
    """World: episodes to record."""
    frames: int = 64
    """World: frames of an episode, at most."""
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """World: a setting of it, such as agents=3. May be given several times."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Videos: how frames of another shape become square."""
    fps: float | None = None
    """Videos: resample to this many frames a second; default: keep the file's."""
    licence: str = "unknown"
    """Videos: under which they may be used; goes into the manifest."""
    seed: int = 0
    """Of the world's episodes and of the split."""
    options: Annotated[IngestOptions, tyro.conf.arg(name="")] = field(default_factory=IngestOptions)


def main(arguments: Arguments) -> None:
    """Ingest, then say what came of it."""
    if (arguments.world is None) == (arguments.videos is None):
        raise SettingsError("give either --world or --videos", fix="`--help` shows examples.")
    place = resolve(arguments.out)
    name = arguments.name or place.path.rpartition("/")[2]
    with Progress("ingest") as progress:
        if arguments.world is not None:
            world = make_world(arguments.world, frame_size=arguments.size, **_options(arguments.option))
            report = ingest_world(
                world,
                place.fs,
                place.path,
                episodes=arguments.episodes,
                frames=arguments.frames,
                seed=arguments.seed,
                name=name,
                options=arguments.options,
                on_progress=progress,
            )
        else:
            assert arguments.videos is not None
            report = ingest_folder(
                arguments.videos,
                place.fs,
                place.path,
                video=VideoOptions(size=arguments.size, fit=arguments.fit, fps=arguments.fps),
                licence=arguments.licence,
                seed=arguments.seed,
                name=name,
                options=arguments.options,
                on_progress=progress,
            )
    show(report, str(place))


def show(report: IngestReport, place: str) -> None:
    """What was left out and why, then the table."""
    for bad in report.bad:
        print(f"left out: {bad.path}: {bad.reason}", flush=True)
    episodes = ", ".join(f"{report.manifest.episodes[split]} {split}" for split in ("train", "val", "test"))
    table(
        f"data set {report.manifest.name}",
        {
            "place": place,
            "episodes": episodes,
            "clips": str(report.clips),
            "frames": str(report.frames),
            "left out": f"{len(report.bad)} files or episodes, {report.dropped_frames} frames at ends",
            "size": f"{report.bytes / 1e6:.1f} MB in {len(report.manifest.shards)} shards",
            "speed": f"{report.frames_per_second:.0f} frames/s",
            "manifest sha256": report.manifest.sha256,
        },
    )


def _options(words: tuple[str, ...]) -> dict[str, int | float | str | bool]:
    """`name=value` words as the numbers or words that they hold."""
    found: dict[str, int | float | str | bool] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(f"--option {word} is not name=value", fix="Write it as --option agents=3.")
        found[key] = _value(value)
    return found


def _value(text: str) -> int | float | str | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")
