"""The trainer's end of the feed: decodes the clips that came and puts their windows into the batches.

Windows of a clip go to many batches. They are copied into all of them as soon as the clip is decoded, while its pixels
are in the processor's cache: a batch fills up long before its step, and most pixels never come to rest in between.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from flam_core.data.codec import Raw, get_codec
from flam_core.data.order import ClipKey, Window
from flam_core.data.quarantine import BadClip
from flam_core.data.shard import decode_actions, decode_clip
from flam_core.errors import DataError, TrainingFailed
from services.feed.meters import FeedMeters
from services.feed.plan import FeedPlan, StagePlan

_AHEAD, _AHEAD_BYTES = 16, 128 << 20
"""Steps whose clips are decoded before the first of them is asked for: so many, unless they are larger than that."""
_KNOWN, _KNOWN_BYTES = 256, 256 << 20
"""Steps beyond those whose windows are known, so that a clip that is decoded can serve them."""
_LOOKED_UP = 64
"""Steps whose windows are looked up at a time: a step alone takes ten times its share of many."""

_FIELDS = ("id", "frames", "height", "width", "codec", "crc32", "error")
"""Of a clip, what decoding needs beside its payload, and why it cannot be had."""

Memory = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Gives an array of a shape and type, of what values there are: page-locked, where batches go on to a GPU."""


@dataclass(frozen=True)
class StepBatch:
    """What one rank trains on at one step."""

    step: int
    """Global step, counted over all stages."""
    frames: np.ndarray
    """uint8 [B, T, H, W, 3], contiguous."""
    ids: list[str]
    """Of the windows."""
    places: list[int]
    """Where each would be, had no window of the rank's been left out."""
    actions: np.ndarray | None = None
    """float32 [B, T, N, S]: what each of N entities was told to do between frames t and t + 1, NaN where not known.
    None unless the plan asks for the truth."""


@dataclass
class _Held:
    """A clip that the rank was given."""

    key: ClipKey
    row: dict[str, Any]
    uses: deque[int] = field(default_factory=deque)
    """Windows of it that are to come and that no thread is told to copy, block by block."""
    begun: bool = False
    """Whether a thread was told to copy some of the first of these blocks."""
    owed: int = 0
    """Windows that a thread was told to copy before the block came that they belong to."""
    error: str | None = None
    told: bool = False
    """Whether the error was reported."""
    pixels: np.ndarray | None = None
    """uint8 [frames, H, W, 3], while windows are to come that were not known when it was decoded."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def given(self, windows: int) -> None:
        """A block has come that has so many windows of it."""
        self.begun = self.begun or self.owed > 0
        paid = min(self.owed, windows)
        self.owed -= paid
        if windows > paid:
            self.uses.append(windows - paid)
        self.begun = self.begun and bool(self.uses)

    def take(self, windows: int) -> None:
        """A thread is told to copy the next so many windows."""
        while windows and self.uses:
            taken = min(windows, self.uses[0])
            windows -= taken
            self.uses[0] -= taken
            self.begun = self.uses[0] > 0
            if not self.uses[0]:
                self.uses.popleft()
        self.owed += windows

    @property
    def keep(self) -> bool:
        """Whether its pixels are wanted again: a block is under way."""
        return self.begun or self.owed > 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.uses and not self.owed


class _Step:
    """A step whose windows are known. Its batch fills up as clips are decoded, by many threads."""

    def __init__(self, number: int, stage: StagePlan, windows: list[Window], memory: Memory) -> None:
        self.number, self.windows = number, windows
        self.held: list[_Held | None] = [None] * len(windows)
        """The clip of each window, once it is needed."""
        self.frames: np.ndarray | None = None
        self.missing: set[int] = set()
        """Places whose clips are broken."""
        self.failure: BaseException | None = None
        """A fault in flam."""
        self.complete = threading.Event()
        self._span, self._skip, self._memory = stage.shape.span, stage.frame_skip, memory
        self._left = len(windows)
        self._lock = threading.Lock()

    def put(self, place: int, start: int, pixels: np.ndarray) -> None:
        """Copy the window that begins at frame `start` of a clip to its place."""
        window = pixels[start : start + self._span : self._skip]
        with self._lock:
            if self.frames is None:
                self.frames = self._memory((len(self.windows), *window.shape), window.dtype)
        self.frames[place] = window
        self._one_less()

    def miss(self, place: int, failure: BaseException | None = None) -> None:
        """There is no such window: the clip is broken, or flam."""
        with self._lock:
            self.missing.add(place)
            self.failure = self.failure or failure
        self._one_less()

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self.complete.set()


class _Place(NamedTuple):
    """Where a window goes."""

    step: _Step
    place: int
    start: int
    """Its first frame in the clip."""


class Assembler:
    """Makes the batches of one rank out of chunks of clips. Not safe for threads."""

    def __init__(
        self,
        plan: FeedPlan,
        rank: int,
        *,
        threads: int = 1,
        memory: Memory = np.empty,
        meters: FeedMeters | None = None,
        on_broken: Callable[[int, BadClip], None] | None = None,
    ) -> None:
        """threads: that decode. on_broken: told once of each clip that cannot be used, with the number of
        its data set; its windows are left out of the batches."""
        self._plan, self._rank = plan, rank
        self._memory = memory
        self._meters = meters or FeedMeters()
        self._on_broken = on_broken or (lambda _source, _clip: None)
        self._clips: dict[ClipKey, _Held] = {}
        self._wanted: dict[ClipKey, list[_Place]] = {}
        """Known windows that no thread is told to copy."""
        self._known: deque[_Step] = deque()
        """Steps that have not begun."""
        self._lookups: Iterator[_Step] | None = None
        self._decoded: deque[tuple[float, int]] = deque()
        """Seconds and frames of clips that the meters do not know of."""
        self._acting: tuple[str, tuple[int, ...]] | None = None  # the first clip with actions, and their [N, S]
        self._pool = ThreadPoolExecutor(threads, "decode")

    def add(self, clips: pa.StructArray, counters: str) -> None:
        """Take the clips of a chunk and what reading them took (`read.schema`).

        Raises DataError if the plan asks for the truth and a clip has no actions, or of other entities than the first.
        """
        self._meters.read(counters)
        columns = [clips.field(name).to_pylist() for name in _FIELDS]
        keys = zip(*(clips.field(name).to_pylist() for name in ("source", "shard", "row_group", "row")), strict=True)
        payloads, uses = clips.field("payload"), clips.field("uses").to_pylist()
        for i, (key, values) in enumerate(zip(map(ClipKey._make, keys), zip(*columns, strict=True), strict=True)):
            row: dict[str, Any] = dict(zip(_FIELDS, values, strict=True)) | {"payload": payloads[i].as_buffer()}
            if self._plan.truth and row["error"] is None:
                row["actions"] = self._actions(clips[i], key.shard)
            held = self._clips.setdefault(key, _Held(key, row, error=row["error"]))
            held.given(uses[i])  # it may be held for a block of the last epoch still
            if held.done:
                del self._clips[key]
            self._tell_if_broken(held)

    def batches(self, steps: range) -> Generator[StepBatch, None, None]:
        """The batches of `steps`, whose clips must have been given. They follow those of the call before.

        While one is put together, the clips of the next are decoded.
        Raises DataError if all clips of a batch are broken, TrainingFailed if a clip was not given.
        """
        if self._lookups is None:
            self._lookups = self._look_up(steps.start)
        ahead = max(1, min(_AHEAD, _AHEAD_BYTES // self._plan.batch_bytes))
        begun: deque[_Step] = deque()
        for _ in steps:
            begun.append(self._begin())
            if len(begun) > ahead:
                yield self._finish(begun.popleft())
        while begun:
            yield self._finish(begun.popleft())

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _actions(self, clip: pa.StructScalar, shard: str) -> np.ndarray:
        """float32 [T, N, S] of a clip, whose N and S are those of all clips before."""
        row = {name: clip[name].as_py() for name in ("id", "frames", "entities", "action_size")}
        values = clip["actions"].values
        flat = None if values is None else values.to_numpy(zero_copy_only=False)
        actions = decode_actions(row | {"actions": flat}, shard)
        name = f"shard {shard}, clip {row['id']}"
        first, shape = self._acting = self._acting or (name, actions.shape[1:])
        if actions.shape[1:] != shape:
            raise DataError(
                f"{name}: actions of (entities, numbers) {actions.shape[1:]}, but {shape} in {first}",
                fix="Ingest all data with ground truth of the same entities, or train on one data set.",
            )
        return actions

    def _look_up(self, start: int) -> Iterator[_Step]:
        """All steps from `start` on, with their windows."""
        for first in range(start, self._plan.total_steps, _LOOKED_UP):
            group = range(first, min(first + _LOOKED_UP, self._plan.total_steps))
            for step, windows in zip(group, self._plan.windows_of(group, self._rank), strict=True):
                yield _Step(step, self._plan.stages[self._plan.stage_of(step)[0]], windows, self._memory)

    def _begin(self) -> _Step:
        """Set the decoding and copying of the next step going."""
        assert self._lookups is not None
        known = max(1, min(_KNOWN, _KNOWN_BYTES // self._plan.batch_bytes))
        while len(self._known) < known and (found := next(self._lookups, None)) is not None:
            self._known.append(found)
            for place, window in enumerate(found.windows):
                self._wanted.setdefault(window.clip, []).append(_Place(found, place, window.start))
        step = self._known.popleft()
        for window in step.windows:
            places = self._wanted.get(window.clip)
            if places is None or places[0].step is not step:
                continue  # a thread is at this one, or was
            del self._wanted[window.clip]
            held = self._clips.get(window.clip)
            if held is None:
                raise TrainingFailed(
                    f"the feed gave rank {self._rank} no clip {window.clip} for step {step.number}",
                    fix="This is a fault in flam: run the command again, it resumes; please report it.",
                )
            for of_step, place, _ in places:
                of_step.held[place] = held
            held.take(len(places))
            if held.done:
                del self._clips[window.clip]
            self._pool.submit(self._fill, held, places, keep=held.keep)
        return step

    def _fill(self, held: _Held, places: list[_Place], *, keep: bool) -> None:
        """Decode a clip and copy its windows to where they go, in a thread of its own."""
        failure = None
        with held.lock:
            if held.pixels is None and held.error is None:
                started = time.perf_counter()
                try:
                    held.pixels = self._pixels(held.key, held.row)
                except DataError as error:
                    held.error = error.what
                except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
                    failure = error
                frames = 0 if held.pixels is None else len(held.pixels)
                self._decoded.append((time.perf_counter() - started, frames))
            pixels = held.pixels
            if not keep:
                held.pixels = None
        for step, place, start in places:
            if pixels is None:
                step.miss(place, failure)
                continue
            try:
                step.put(place, start, pixels)
            except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
                step.miss(place, error)

    def _finish(self, step: _Step) -> StepBatch:
        step.complete.wait()
        while self._decoded:
            seconds, frames = self._decoded.popleft()
            self._meters.decode_seconds += seconds
            self._meters.decoded_clips += bool(frames)
            self._meters.decoded_frames += frames
        if step.failure is not None:
            raise step.failure
        frames = step.frames
        places = list(range(len(step.windows)))
        if step.missing:
            for held in step.held:
                assert held is not None, "its window was not copied"
                self._tell_if_broken(held)
            places = [place for place in places if place not in step.missing]
            frames = None if frames is None else frames[places]
        if frames is None:
            last = step.held[-1]
            raise DataError(
                f"all {len(step.windows)} clips of rank {self._rank} at step {step.number} are broken, the last: "
                f"{last.error if last else ''}",
                fix="Run jobs/ingest.py --verify on the data set, which leaves them out of the plan.",
            )
        ids = [step.windows[place].id for place in places]
        return StepBatch(step.number, frames, ids, places, self._actions_of(step, places) if self._plan.truth else None)

    def _actions_of(self, step: _Step, places: list[int]) -> np.ndarray:
        """float32 [B, T, N, S] of the step's windows at `places`."""
        span = self._plan.stages[self._plan.stage_of(step.number)[0]].shape.span
        starts = ((step.held[place], step.windows[place].start) for place in places)
        parts = [held.row["actions"][start : start + span] for held, start in starts if held is not None]
        actions = self._memory((len(parts), *parts[0].shape), parts[0].dtype)
        return np.stack(parts, out=actions)

    def _pixels(self, key: ClipKey, row: dict[str, Any]) -> np.ndarray:
        """The frames of a clip. Raises DataError if there are none."""
        if row["codec"] == Raw.name:  # decoded and checked by a task
            pixels = get_codec(Raw.name).decode(row["payload"], row["frames"], row["height"], row["width"])
        else:
            pixels = decode_clip(row, key.shard)
        if pixels.shape[1:3] != self._plan.frame_size:
            raise DataError(f"frames are {pixels.shape[1:3]}, the manifest says {self._plan.frame_size}")
        return pixels

    def _tell_if_broken(self, held: _Held) -> None:
        """Report a clip that cannot be used, once."""
        if held.error is None or held.told:
            return
        held.told = True
        key = held.key
        shard = next(s for s in self._plan.sources[key.source].manifest.shards if s.name == key.shard)
        row = sum(shard.row_groups[: key.row_group]) + key.row
        name = held.row.get("id")
        self._meters.broken_clips += 1
        clip = BadClip(key.shard, row, name if isinstance(name, str) else None, held.error or "unknown")
        self._on_broken(key.source, clip)
