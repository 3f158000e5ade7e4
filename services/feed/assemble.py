"""The trainer's end of the feed: holds the clips that came, decodes each once, and cuts batches from them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from flam_core.data.codec import Raw, get_codec
from flam_core.data.order import ClipKey, Window
from flam_core.data.quarantine import BadClip
from flam_core.data.shard import decode_actions, decode_clip
from flam_core.errors import DataError, TrainingFailed
from services.feed.meters import FeedMeters
from services.feed.plan import FeedPlan

_AHEAD, _AHEAD_BYTES = 8, 128 << 20
"""Steps that are decoded and put together at a time: so many, unless they are larger than that."""

_LOOKED_UP = 64
"""Steps whose windows are looked up at a time: a step alone takes ten times its share of many."""

_FIELDS = ("id", "frames", "height", "width", "codec", "crc32", "error")
"""Of a clip, what decoding needs beside its payload, and why it cannot be had."""

Stack = Callable[[list[np.ndarray]], np.ndarray]
"""Copies arrays of one shape and type into a new one: into page-locked memory, where batches go on to a GPU."""


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

    row: dict[str, Any]
    uses: deque[int]
    """Windows of it that are still to come, block by block."""
    error: str | None = None
    decoding: _Decoding | None = None
    """Once its pixels were needed, until the block is done."""


class _Decoding:
    """A clip on its way through a decoder. Lighter than a `Future`, of which each window would take a lock or two."""

    __slots__ = ("_lock", "_waiting", "failed", "noted", "result", "seconds")

    def __init__(self) -> None:
        self.result: np.ndarray | str | BaseException | None = None
        """uint8 [frames, H, W, 3], or why there are none, or a fault in flam; None until it is done."""
        self.seconds = 0.0
        self.noted = False
        """Whether the meters know."""
        self.failed = False
        """Whether there are no pixels, once the meters know."""
        self._waiting: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def set(self, result: np.ndarray | str | BaseException, seconds: float) -> None:
        """It is done: run what waits for it, in this thread, and forget it, for it may hold these very pixels."""
        with self._lock:
            self.result, self.seconds = result, seconds
            waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def when_done(self, call: Callable[[], None]) -> None:
        """Run that once it is done, or now if it is."""
        with self._lock:
            if self.result is None:
                self._waiting.append(call)
                return
        call()


class _Due(NamedTuple):
    """A window of a step that has begun."""

    window: Window
    held: _Held
    decoding: _Decoding | None
    """None for a clip that is known to be broken. Kept here: the clip may be let go of before the step is done."""

    @property
    def good(self) -> bool:
        """Whether the window is in the batch, once the meters know of its clip."""
        return self.decoding is not None and not self.decoding.failed


@dataclass(frozen=True)
class _Begun:
    """A step that is being put together."""

    step: int
    due: list[_Due]
    frames: Future[np.ndarray | None]


class Assembler:
    """Makes the batches of one rank out of chunks of clips. Not safe for threads."""

    def __init__(
        self,
        plan: FeedPlan,
        rank: int,
        *,
        threads: int = 1,
        stack: Stack = np.stack,
        meters: FeedMeters | None = None,
        on_broken: Callable[[int, BadClip], None] | None = None,
    ) -> None:
        """threads: that decode. on_broken: told once of each clip that cannot be used, with the number of
        its data set; its windows are left out of the batches."""
        self._plan, self._rank = plan, rank
        self._stack = stack
        self._meters = meters or FeedMeters()
        self._on_broken = on_broken or (lambda _source, _clip: None)
        self._clips: dict[ClipKey, _Held] = {}
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
            held = self._clips.setdefault(key, _Held(row, deque(), error=row["error"]))
            held.uses.append(uses[i])  # it may be held for a block of the last epoch still
            if held.error is not None and len(held.uses) == 1:
                self._broken(key, held)

    def batches(self, steps: range) -> Generator[StepBatch, None, None]:
        """The batches of `steps`, whose clips must have been given.

        While one is put together, the clips of the next are decoded.
        Raises DataError if all clips of a batch are broken, TrainingFailed if a clip was not given.
        """
        begun: deque[_Begun] = deque()
        ahead = max(1, min(_AHEAD, _AHEAD_BYTES // self._plan.batch_bytes))
        for first in range(steps.start, steps.stop, _LOOKED_UP):
            group = range(first, min(first + _LOOKED_UP, steps.stop))
            for step, windows in zip(group, self._plan.windows_of(group, self._rank), strict=True):
                begun.append(self._begin(step, windows))
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

    def _begin(self, step: int, windows: list[Window]) -> _Begun:
        """Set the decoding and copying of a step going."""
        due = []
        for window in windows:
            held = self._clips.get(window.clip)
            if held is None:
                raise TrainingFailed(
                    f"the feed gave rank {self._rank} no clip {window.clip} for step {step}",
                    fix="This is a fault in flam: run the command again, it resumes; please report it.",
                )
            if held.decoding is None and held.error is None:
                held.decoding = _Decoding()
                self._pool.submit(self._decode, held.decoding, window.clip, held.row)
            due.append(_Due(window, held, held.decoding))
        return _Begun(step, due, self._once_decoded(step, due))

    def _once_decoded(self, step: int, due: list[_Due]) -> Future[np.ndarray | None]:
        """The frames of a step, copied by whichever thread decodes the last of its clips: none waits for another."""
        waiting = {id(one.decoding): one.decoding for one in due if one.decoding and one.decoding.result is None}
        if not waiting:
            return self._pool.submit(self._copy, step, due)
        copied: Future[np.ndarray | None] = Future()
        left = itertools.count(len(waiting) - 1, -1)  # which is safe among threads

        def decoded() -> None:
            if next(left) > 0:
                return
            try:
                copied.set_result(self._copy(step, due))
            except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
                copied.set_exception(error)

        for decoding in waiting.values():
            decoding.when_done(decoded)
        return copied

    def _copy(self, step: int, due: list[_Due]) -> np.ndarray | None:
        """The frames of a step, whose clips are decoded; None if all of them are broken."""
        stage = self._plan.stages[self._plan.stage_of(step)[0]]
        span, skip = stage.shape.span, stage.frame_skip
        good = []
        for window, _, decoding in due:
            if decoding is None:
                continue
            pixels = decoding.result
            if isinstance(pixels, np.ndarray):
                good.append(pixels[window.start : window.start + span : skip])
            elif isinstance(pixels, BaseException):
                raise pixels
        return self._stack(good) if good else None

    def _finish(self, begun: _Begun) -> StepBatch:
        frames = begun.frames.result()
        for one in begun.due:
            if one.decoding is not None and not one.decoding.noted:
                self._note(one, one.decoding)
        if frames is None:
            raise DataError(
                f"all {len(begun.due)} clips of rank {self._rank} at step {begun.step} are broken, the last: "
                f"{begun.due[-1].held.error}",
                fix="Run jobs/ingest.py --verify on the data set, which leaves them out of the plan.",
            )
        for one in begun.due:
            uses = one.held.uses
            uses[0] -= 1
            if not uses[0]:
                self._used_up(one.window.clip, one.held)
        places = [place for place, one in enumerate(begun.due) if one.good]
        ids = [begun.due[place].window.id for place in places]
        return StepBatch(begun.step, frames, ids, places, self._actions_of(begun) if self._plan.truth else None)

    def _actions_of(self, begun: _Begun) -> np.ndarray:
        """float32 [B, T, N, S] of the step's windows, those of broken clips left out."""
        span = self._plan.stages[self._plan.stage_of(begun.step)[0]].shape.span
        return self._stack(
            [one.held.row["actions"][one.window.start : one.window.start + span] for one in begun.due if one.good]
        )

    def _note(self, due: _Due, decoding: _Decoding) -> None:
        """Count what decoding gave."""
        decoding.noted = True
        self._meters.decode_seconds += decoding.seconds
        if isinstance(decoding.result, np.ndarray):
            self._meters.decoded_clips += 1
            self._meters.decoded_frames += len(decoding.result)
        else:
            due.held.error, decoding.failed = str(decoding.result), True
            self._broken(due.window.clip, due.held)

    def _used_up(self, key: ClipKey, held: _Held) -> None:
        """A block's windows of a clip are done: its pixels go, so that they take no more room than a block does."""
        held.uses.popleft()
        held.decoding = None
        if not held.uses:
            del self._clips[key]

    def _decode(self, decoding: _Decoding, key: ClipKey, row: dict[str, Any]) -> None:
        """Decode a clip, in a thread of its own."""
        started = time.perf_counter()
        try:
            result = self._pixels(key, row)
        except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
            result = error
        decoding.set(result, time.perf_counter() - started)

    def _pixels(self, key: ClipKey, row: dict[str, Any]) -> np.ndarray | str:
        """The frames of a clip, or why there are none."""
        if row["codec"] == Raw.name:  # decoded and checked by a task
            pixels = get_codec(Raw.name).decode(row["payload"], row["frames"], row["height"], row["width"])
        else:
            try:
                pixels = decode_clip(row, key.shard)
            except DataError as error:
                return error.what
        if pixels.shape[1:3] != self._plan.frame_size:
            return f"frames are {pixels.shape[1:3]}, the manifest says {self._plan.frame_size}"
        return pixels

    def _broken(self, key: ClipKey, held: _Held) -> None:
        shard = next(s for s in self._plan.sources[key.source].manifest.shards if s.name == key.shard)
        row = sum(shard.row_groups[: key.row_group]) + key.row
        name = held.row.get("id")
        self._meters.broken_clips += 1
        clip = BadClip(key.shard, row, name if isinstance(name, str) else None, held.error or "unknown")
        self._on_broken(key.source, clip)
