"""Make a data set (manifest + shards) of a built-in world, of videos, or of data in other people's formats.

    python jobs/ingest.py --world grid --out data/grid --size 64 --episodes 800
    python jobs/ingest.py --world grid --option agents=3 --option cells=6 --size 48 --out s3://bucket/grid
    python jobs/ingest.py --videos ~/clips --size 128 --fit crop --fps 10 --out data/clips
    python jobs/ingest.py --videos ~/clips --codec zstd --out data/clips
    python jobs/ingest.py --webdataset 's3://bucket/clips/train-*.tar' --image_fps 10 --out data/clips
    python jobs/ingest.py --parquet ~/clips --video_column mp4 --out data/clips
    python jobs/ingest.py --lerobot ~/pusht --camera observation.image --fps 10 --out data/pusht
    python jobs/ingest.py --verify data/clips --max_bad_share 0.01

Formats: docs/data.md. Worlds: grid, goal, and with `make worlds` multigrid, bigfish, leaper, starpilot, driving. Files
that cannot be used are named with the reason, here and in the data set's quarantine.json; the rest goes through. The
codec is measured on the first clips, and the measurements shown, unless --codec names one. --verify reads all of a data
set again and lists broken clips there too, so that training leaves them out; it ends with exit code 4 if they are too
many.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/ingest.py` puts only jobs/ on the path

from flam_core.data.codec_choice import CodecChoice
from flam_core.data.ingest import IngestOptions, IngestReport, ingest
from flam_core.data.quarantine import MAX_BAD_SHARE, check_share, write_quarantine
from flam_core.data.sources import SourceFlags, choose_source
from flam_core.data.verify import VerifyReport, verify_data
from services.console import Progress, run_program, table
from services.storage import resolve


@dataclass(frozen=True)
class Arguments:
    """What `jobs/ingest.py` takes."""

    out: str
    """Where the data set goes: a folder or s3://bucket/prefix."""
    name: str | None = None
    """Of the data set, and so of its models (flam-NAME); default: the last part of --out."""
    seed: int = 0
    """Of the world's episodes and of the split."""
    source: Annotated[SourceFlags, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(
        default_factory=SourceFlags
    )
    options: Annotated[IngestOptions, tyro.conf.arg(name="")] = field(default_factory=IngestOptions)


@dataclass(frozen=True)
class VerifyArguments:
    """What `jobs/ingest.py --verify` takes."""

    verify: str
    """The data set: a folder or s3://bucket/prefix. `--verify --out DATA` means the same."""
    max_bad_share: float = MAX_BAD_SHARE
    """Share of the clips that may be broken, 0 to 1."""
    workers: int | None = None
    """Shards read at a time; default: one a CPU."""


def main(arguments: Arguments) -> None:
    """Ingest, then say what came of it."""
    source = choose_source(arguments.source, arguments.seed, resolve)
    place = resolve(arguments.out)
    name = arguments.name or place.path.rpartition("/")[2]
    with Progress("ingest") as progress:
        report = ingest(
            source,
            place.fs,
            place.path,
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
    if report.codec_choice is not None:
        show_codecs(report.codec_choice)
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
            "codec": report.manifest.codec,
            "speed": f"{report.frames_per_second:.0f} frames/s",
            "manifest sha256": report.manifest.sha256,
        },
    )


def verify(arguments: VerifyArguments) -> None:
    """Verify, write quarantine.json, say what is broken. Raises DataError if it is more than may be."""
    check_share(arguments.max_bad_share)
    place = resolve(arguments.verify)
    with Progress("verify") as progress:
        report = verify_data(place.fs, place.path, workers=arguments.workers, on_progress=progress)
    write_quarantine(place.fs, place.path, report.quarantine)
    show_verified(report, str(place))
    report.quarantine.check(report.manifest, arguments.max_bad_share)


def show_verified(report: VerifyReport, place: str) -> None:
    """What is broken and why, then the table."""
    for bad in report.quarantine.clips:
        print(f"bad: {bad}", flush=True)
    table(
        f"data set {report.manifest.name}",
        {
            "place": place,
            "clips": str(report.manifest.clips),
            "bad": str(report.bad_clips),
            "share": f"{report.share:.2%}",
            "speed": f"{report.frames_per_second:.0f} frames/s",
            "manifest sha256": report.manifest.sha256,
            "quarantine sha256": report.quarantine.sha256 or "none",
        },
    )


def _verify_words(words: list[str]) -> list[str] | None:
    """The words of a verification, with `--verify --out DATA` as `--verify DATA`; None if it is none."""
    if not any(word.partition("=")[0] == "--verify" for word in words):
        return None
    if not any(word.partition("=")[0] == "--out" for word in words):
        return words
    words = [word for word in words if word != "--verify"]
    return [f"--verify{word[5:]}" if word.partition("=")[0] == "--out" else word for word in words]


def show_codecs(choice: CodecChoice) -> None:
    """What each codec did with the first clips, and why one was taken."""
    table(
        f"codecs, measured on {choice.clips} clips ({choice.frames} frames)",
        {
            one.codec: f"{one.bytes_per_frame:.0f} bytes/frame, {one.share_of_raw:.1%} of raw, "
            + ("lossless" if one.psnr_db == math.inf else f"PSNR {one.psnr_db:.1f} dB")
            + f", decodes {one.frames_per_second:.0f} frames/s on one core"
            for one in choice.measured
        },
    )
    print(f"codec {choice.codec}: {choice.reason}", flush=True)


if __name__ == "__main__":
    verify_words = _verify_words(sys.argv[1:])
    if verify_words is None:
        run_program(Arguments, main, description=__doc__ or "")
    else:
        run_program(VerifyArguments, verify, argv=verify_words, description=__doc__ or "")
