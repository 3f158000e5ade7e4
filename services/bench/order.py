"""`jobs/bench.py order`: how long it takes to find any batch among very many windows, and what memory that needs."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np

from flam_core.data.manifest import Manifest, Shard
from flam_core.data.order import SampleOrder, WindowShape

_CLIPS_A_SHARD, _CLIPS_A_GROUP = 1024, 64
_CALLS = 500


@dataclass(frozen=True)
class OrderBenchSettings:
    """How many windows, in how many clips."""

    windows: int = 1_000_000_000
    """In an epoch."""
    clips: int = 1_000_000
    """The windows are shared out among so many clips of equal length."""
    frames: int = 16
    """Frames of a window."""
    batch: int = 64
    """Windows of a batch."""


def bench_order(settings: OrderBenchSettings) -> dict[str, Any]:
    """Milliseconds of `SampleOrder.batch(n)` for n at random in a hundred epochs and for n in a row; bytes held."""
    manifest = _manifest(settings)
    tracemalloc.start()
    started = time.perf_counter()
    order = SampleOrder(manifest, "train", shape=WindowShape(settings.frames), batch=settings.batch, seed=0)
    seconds = time.perf_counter() - started
    batches = order.epoch_windows // settings.batch
    at_random = np.random.default_rng(0).integers(0, 100 * batches, _CALLS).tolist()
    order.batch(0)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    in_a_row = range(batches // 2, batches // 2 + _CALLS)
    times = {"random": [_time(order, n) for n in at_random], "in_a_row": [_time(order, n) for n in in_a_row]}
    return {
        "windows": order.epoch_windows,
        "clips": settings.clips,
        "make_seconds": seconds,
        "order_bytes": held,
        **{f"batch_ms_{name}": statistics.median(found) for name, found in times.items()},
        **{f"batch_ms_{name}_p99": float(np.quantile(found, 0.99)) for name, found in times.items()},
    }


def _time(order: SampleOrder, n: int) -> float:
    started = time.perf_counter()
    order.batch(n)
    return (time.perf_counter() - started) * 1000


def _manifest(settings: OrderBenchSettings) -> Manifest:
    """A manifest as of a data set that nobody has."""
    shards = max(1, settings.clips // _CLIPS_A_SHARD)
    length = max(1, settings.windows // (shards * _CLIPS_A_SHARD)) * settings.frames
    made = [_shard("train", number, length, _CLIPS_A_SHARD) for number in range(shards)]
    made += [_shard(split, 0, length, 1) for split in ("val", "test")]
    return Manifest(
        name="made-up",
        source="a benchmark",
        licence="none",
        settings={},
        frame_size=(64, 64),
        fps=10.0,
        has_truth=False,
        codec="zstd",
        episodes={"train": 1, "val": 1, "test": 1},
        clips=sum(shard.clips for shard in made),
        frames=sum(shard.frames for shard in made),
        shards=tuple(made),
    )


def _shard(split: str, number: int, length: int, clips: int) -> Shard:
    groups = tuple(min(_CLIPS_A_GROUP, clips - first) for first in range(0, clips, _CLIPS_A_GROUP))
    return Shard(
        name=f"shards/{split}-{number:06d}.parquet",
        split=split,
        bytes=1,
        sha256=f"{number:064x}",
        clips=clips,
        frames=clips * length,
        clip_frames=(length,) * clips,
        row_groups=groups,
    )
