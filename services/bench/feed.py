"""`jobs/bench.py feed`: the feed beside a plain loop and a DataLoader, on the same clips, in one run."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ExecutionResources

from flam_core.data.ingest import ingest_world
from flam_core.data.manifest import Manifest, read_manifest
from flam_core.errors import SettingsError
from flam_core.worlds import make_world
from services.bench import s3_server
from services.bench.processes import PeakMemory, watched
from services.bench.rivals import (
    plain_loop,
    torch_dataloader,
    webdataset_installed,
    webdataset_loader,
    write_tars,
)
from services.feed import Assembler, CacheSettings, FeedMeters, FeedPlan, FeedSource, StagePlan, make_dataset, steps_of
from services.feed.prefetch import DevicePrefetcher, memory_for
from services.feed.spill import spilled_bytes
from services.local.s3 import installed
from services.storage import Location, resolve

_STEPS = 1_000_000
"""Longer than any benchmark: the feed ends when the consumer does."""


@dataclass(frozen=True)
class FeedBenchSettings:
    """What is measured and how long."""

    data: str | None = None
    """A data set, local; default: one of the world `grid`, made for the run."""
    size: int = 64
    """Frame size of the made data."""
    episodes: int = 640
    """Episodes of 128 frames of the made data."""
    frames: int = 16
    """Frames of a window."""
    batch: int = 32
    """Windows of a batch."""
    seconds: float = 12.0
    """For which each way is measured, and the plain loop as long, in turns."""
    rounds: int = 3
    """Times that each way is measured. Numbers are medians over rounds."""
    warm_seconds: float = 5.0
    """Between the first batch and the measuring, for processes to start and read ahead."""
    step_ms: float = 50.0
    """Length of a made-up training step, for the share of the time that it would wait for data."""
    soak_minutes: float = 0.0
    """Run the feed alone for so long and report how its memory grew."""
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads or processes that each way may use."""


@dataclass
class _Measured:
    """One way of reading: a number for each round."""

    frames_per_second: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    """Frames a second of the plain loop, in turns with it."""
    over_loop: list[float] = field(default_factory=list)
    """Its speed over that of the plain loop: the median over their turns."""
    first_batch_seconds: list[float] = field(default_factory=list)


_RESUMED = "feed_resumed"
_RESUME_STEP = 10_007
"""In the middle of an epoch, a block and a chunk."""
_CPU = torch.device("cpu")
_TURN_SECONDS, _TURN_WARM_SECONDS = 2.0, 0.5
"""In such turns a way and the plain loop are measured: a busy machine gives now more and now less, for seconds at a
time. What stood still during the other's turn first comes up to speed."""
_SETTLE_SECONDS = 2.0
"""For the processes and threads of the feed to end: one of Ray Data's that still waited for data when Ray is shut down
would end this process."""
_TASK_CPUS, _FEED_CPUS = 0.5, 1.0
"""Of a read task, and of the feed: as when Ray Train has left it one CPU."""

Batches = Callable[[], Generator[np.ndarray, None, None]]


def bench_feed(settings: FeedBenchSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure everything; the result is plain JSON (docs/performance.md says what each key means)."""
    if settings.seconds <= 0 or settings.rounds < 1 or settings.cores < 1:
        raise SettingsError("bench feed: seconds, rounds and cores must be above 0", fix="Check the settings.")
    with ExitStack() as stack:
        # As in a training worker. With as many as cores, PyTorch's threads wait for one another most of the time.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(max(1, settings.cores - 1))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flam-bench-")))
        local = resolve(settings.data or _make_data(settings, folder / "grid"))
        manifest = read_manifest(local.fs, local.path)
        uri = stack.enter_context(s3_server.running()) if installed() else None
        memory = stack.enter_context(watched())
        ray.init(
            address="local",
            num_cpus=settings.cores + 2,
            object_store_memory=1 << 30,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        stack.callback(ray.shutdown)
        if settings.soak_minutes:
            return _soak(settings, local, manifest, memory, say)
        ways = _ways(settings, local, manifest, folder, uri)
        found = {name: _Measured() for name in ways}
        loop = plain_loop(local, manifest, settings.frames, settings.batch, settings.cores)
        for turn in range(settings.rounds):
            for name, batches in ways.items():
                told = _measure(settings, found[name], batches(), loop, first_only=name == _RESUMED)
                say(f"round {turn + 1}: {name}: {told}")
        loop.close()
        result = _result(settings, manifest, found, _steps(settings, local, manifest))
        result["spilled_bytes"] = spilled_bytes()
        result["peak_rss_bytes"] = dict(sorted(memory.peak.items()))
        return result


def _result(
    settings: FeedBenchSettings, manifest: Manifest, found: dict[str, _Measured], step: dict[str, float]
) -> dict[str, Any]:
    first = {name: one.first_batch_seconds for name, one in found.items()}
    timed = {name: one for name, one in found.items() if name != _RESUMED}
    speeds = {name: one.frames_per_second for name, one in timed.items()}
    speeds["loop"] = [speed for one in timed.values() for speed in one.loop]
    over_loop = {name: one.over_loop for name, one in timed.items()}
    return {
        "feed_over_loop": statistics.median(over_loop["feed_local"]),
        "feed_over_torch_dataloader": _ratio(over_loop, "feed_local", "torch_dataloader"),
        "feed_over_webdataset": _ratio(over_loop, "feed_local", "webdataset"),
        "s3_over_local": _ratio(over_loop, "feed_s3", "feed_local"),
        "cached_s3_over_local": _ratio(over_loop, "feed_s3_cached", "feed_local"),
        "resume_over_start_first_batch": _ratio(first, _RESUMED, "feed_local"),
        "frames_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "feed_frames_per_second_per_core": statistics.median(speeds["feed_local"]) / settings.cores,
        "first_batch_seconds": {name: statistics.median(values) for name, values in first.items()},
        **step,
        "rounds": speeds,
        "rounds_over_loop": over_loop,
        "cores": settings.cores,
        "data": {
            "name": manifest.name,
            "codec": manifest.codec,
            "frame_size": list(manifest.frame_size),
            "frames": manifest.frames,
            "bytes_per_frame": manifest.total_bytes / manifest.frames,
            "window_frames": settings.frames,
            "batch_windows": settings.batch,
        },
    }


def _ratio(values: dict[str, list[float]], a: str, b: str) -> float | None:
    """Median over rounds of one way over another; None where one was not measured."""
    if a not in values or b not in values:
        return None
    return statistics.median(x / y for x, y in zip(values[a], values[b], strict=True))


def _make_data(settings: FeedBenchSettings, place: Path) -> Path:
    location = resolve(place)
    world = make_world("grid", frame_size=settings.size, agents=4)
    ingest_world(world, location.fs, location.path, episodes=settings.episodes, frames=128)
    return place


def _ways(
    settings: FeedBenchSettings, local: Location, manifest: Manifest, folder: Path, uri: str | None
) -> dict[str, Batches]:
    shape = settings.frames, settings.batch, settings.cores
    ways: dict[str, Batches] = {
        "feed_local": lambda: _feed(settings, local, manifest),
        "torch_dataloader": lambda: torch_dataloader(local, manifest, *shape),
        _RESUMED: lambda: _feed(settings, local, manifest, start=_RESUME_STEP),
    }
    if uri is not None:
        bucket = resolve(f"{uri}/data")
        _upload(local, manifest, bucket)
        cache = CacheSettings(str(folder / "cache"), 20 << 30)
        ways["feed_s3"] = lambda: _feed(settings, bucket, manifest)
        ways["feed_s3_cached"] = lambda: _feed(settings, bucket, manifest, cache=cache)
    if webdataset_installed():
        (folder / "tars").mkdir()
        tars = write_tars(local, manifest, folder / "tars")
        ways["webdataset"] = lambda: webdataset_loader(tars, *shape)
    return ways


def _upload(local: Location, manifest: Manifest, bucket: Location) -> None:
    for name in ("manifest.json", *(shard.name for shard in manifest.shards)):
        with bucket.fs.open_output_stream(f"{bucket.path}/{name}") as stream:
            stream.write(Path(local.path, name).read_bytes())


def _feed(
    settings: FeedBenchSettings,
    data: Location,
    manifest: Manifest,
    *,
    start: int = 0,
    cache: CacheSettings | None = None,
    meters: FeedMeters | None = None,
) -> Generator[np.ndarray, None, None]:
    """The feed as a trainer of one rank has it, in this process. For ever."""
    plan = _plan(settings, data, manifest)
    meters = meters or FeedMeters()
    limits = ExecutionResources(cpu=_FEED_CPUS)
    ray.data.DataContext.get_current().execution_options.resource_limits = limits
    (shard,) = make_dataset(plan, start, task_cpus=_TASK_CPUS, cache=cache).streaming_split(1)
    assembler = Assembler(plan, 0, threads=settings.cores, memory=memory_for(_CPU), meters=meters)
    prefetcher = DevicePrefetcher(steps_of(shard, plan, start, assembler, 0), _CPU, meters, plan.batch_bytes)
    try:
        for batch in prefetcher:
            yield batch.frames.numpy()
    finally:
        prefetcher.close()
        assembler.close()
        time.sleep(_SETTLE_SECONDS)


def _plan(settings: FeedBenchSettings, data: Location, manifest: Manifest) -> FeedPlan:
    stages = (StagePlan(_STEPS, settings.batch, settings.frames),)
    return FeedPlan((FeedSource(data, manifest),), stages, seed=0, world=1)


def _measure(
    settings: FeedBenchSettings,
    found: _Measured,
    batches: Generator[np.ndarray, None, None],
    loop: Iterator[np.ndarray],
    *,
    first_only: bool,
) -> str:
    """Time the first batch and, once warm, the speed in turns with the plain loop; what came of it, in words."""
    started = time.perf_counter()
    next(batches)
    found.first_batch_seconds.append(time.perf_counter() - started)
    told = f"first batch after {found.first_batch_seconds[-1]:.1f} s"
    if not first_only:
        _frames_in(batches, settings.warm_seconds)
        seconds = min(_TURN_SECONDS, settings.seconds)
        turns = [(_speed(batches, seconds), _speed(loop, seconds)) for _ in range(round(settings.seconds / seconds))]
        found.frames_per_second.append(statistics.median(speed for speed, _ in turns))
        found.loop.append(statistics.median(of_loop for _, of_loop in turns))
        found.over_loop.append(statistics.median(speed / of_loop for speed, of_loop in turns))
        told += f", then {found.frames_per_second[-1]:.0f} frames/s, {found.over_loop[-1]:.2f} of the plain loop"
    batches.close()
    return told


def _speed(batches: Iterator[np.ndarray], seconds: float) -> float:
    """Frames a second."""
    _frames_in(batches, _TURN_WARM_SECONDS)
    return _frames_in(batches, seconds) / seconds


def _frames_in(batches: Iterator[np.ndarray], seconds: float) -> int:
    end, frames = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        batch = next(batches)
        frames += batch.shape[0] * batch.shape[1]
    return frames


def _steps(settings: FeedBenchSettings, data: Location, manifest: Manifest) -> dict[str, float]:
    """What a trainer with steps of `step_ms` waits for data: on the whole, and in the step after an epoch's end."""
    meters = FeedMeters()
    batches = _feed(settings, data, manifest, meters=meters)
    next(batches)
    order = (
        FeedPlan((FeedSource(data, manifest),), (StagePlan(_STEPS, settings.batch, settings.frames),), seed=0, world=1)
        .mixtures()[0]
        .orders[0]
    )
    epoch = order.epoch_windows // settings.batch
    steps = max(int(settings.seconds / (settings.step_ms / 1000)), 2 * epoch + 10)
    waits = []
    for _ in range(steps):
        time.sleep(settings.step_ms / 1000)
        begun = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begun)
    batches.close()
    ends = [waits[i] for i in range(len(waits)) if (i + 1) % epoch == 0]
    return {
        "wait_share": sum(waits) / (sum(waits) + steps * settings.step_ms / 1000),
        "wait_share_step_ms": settings.step_ms,
        "epochs": steps / epoch,
        "median_wait_seconds": statistics.median(waits),
        "epoch_end_wait_seconds": statistics.median(ends) if ends else 0.0,
        "longest_wait_seconds": max(waits),
    }


def _soak(
    settings: FeedBenchSettings, data: Location, manifest: Manifest, memory: PeakMemory, say: Callable[[str], None]
) -> dict[str, Any]:
    """The feed at full speed for a long time: memory after a first tenth, and at the end."""
    batches, begun, frames, told = _feed(settings, data, manifest), time.monotonic(), 0, 0
    while (past := time.monotonic() - begun) < settings.soak_minutes * 60:
        try:
            batch = next(batches)
        except StopIteration:
            batches = _feed(settings, data, manifest)
            continue
        frames += batch.shape[0] * batch.shape[1]
        if past // 60 > told:
            told = int(past // 60)
            say(f"minute {told}: {frames / past:.0f} frames/s, {memory.totals[-1] / 2**20:.0f} MiB in all processes")
    batches.close()  # before Ray is: a thread that reads from it afterwards ends the process
    totals = np.array(memory.totals[len(memory.totals) // 10 :], dtype=np.float64)
    tenth = max(1, len(totals) // 10)
    return {
        "soak_minutes": settings.soak_minutes,
        "frames_per_second": frames / past,
        "rss_start_bytes": float(np.median(totals[:tenth])),
        "rss_end_bytes": float(np.median(totals[-tenth:])),
        "rss_end_over_start": float(np.median(totals[-tenth:]) / np.median(totals[:tenth])),
        "spilled_bytes": spilled_bytes(),
        "peak_rss_bytes": dict(sorted(memory.peak.items())),
    }
