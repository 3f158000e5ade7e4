"""Batches on the device before they are asked for. Imports PyTorch, which read tasks must not."""

from __future__ import annotations

import ctypes
import gc
import math
import queue
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.feed.assemble import Memory, StepBatch
from services.feed.meters import FeedMeters

_DEPTH, _DEPTH_BYTES = 4, 256 << 20
"""Batches that lie ready at most: so many, unless they are larger than that."""
_WORTH_KEEPING = 1 << 20
"""Bytes from which on an array's memory is used again."""
_JOIN_SECONDS = 10.0
_SWITCH_SECONDS = 0.0005


def memory_for(device: torch.device) -> Memory:
    """Memory for batches on their way to a device: for a GPU page-locked, as only from such the copy can run beside
    computation, else memory that is used again."""
    if device.type != "cuda":
        return _Memory().array

    def locked(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        # PyTorch uses such memory again itself.
        size = math.prod(shape) * dtype.itemsize
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)

    return locked


class _Memory:
    """Arrays in memory that is used again once nothing looks at it: fresh pages cost a tenth of a batch's time."""

    def __init__(self) -> None:
        self._free: tuple[int, list[np.ndarray]] = 0, []
        """Of one size, which comes first: batches keep theirs for long. One value, since many threads take from it."""

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of what values there are."""
        size = math.prod(shape) * dtype.itemsize
        if size < _WORTH_KEEPING:
            return np.empty(shape, dtype)
        of_size, free = self._free
        if size != of_size:
            _, free = self._free = size, []
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        # Whatever is made of the array refers to this owner, however far removed: NumPy skips views, but not this.
        owner: Any = (ctypes.c_uint8 * size).from_buffer(memory)  # pyright: ignore[reportArgumentType] - it is a buffer
        weakref.finalize(owner, free.append, memory).atexit = False
        return np.frombuffer(owner, dtype).reshape(shape)


@dataclass(frozen=True)
class DeviceBatch:
    """A `StepBatch` on the device."""

    step: int
    frames: Tensor
    """uint8 [B, T, H, W, 3]"""
    ids: list[str]
    places: list[int]
    """Where each window would be, had none of the rank's been left out."""
    actions: Tensor | None
    """float32 [B, T, N, S], or None unless the plan asks for the truth."""


class DevicePrefetcher:
    """Runs an iterator of batches in a thread, and copies each batch to the device one step ahead of its use."""

    def __init__(
        self, batches: Generator[StepBatch, None, None], device: torch.device, meters: FeedMeters, batch_bytes: int
    ) -> None:
        """batches must lie in memory of `memory_for(device)`; batch_bytes is the size of the largest."""
        depth = max(1, min(_DEPTH, _DEPTH_BYTES // batch_bytes))
        self._batches, self._device, self._meters = batches, device, meters
        self._queue: queue.Queue[StepBatch | BaseException | None] = queue.Queue(depth)
        self._ended = False
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)

    def start(self) -> None:
        """Begin to fill, if it has not begun."""
        if self._thread.ident is None:
            self._thread.start()

    def __iter__(self) -> Iterator[DeviceBatch]:
        """All batches. Raises what the feed raises, after the last batch that it gave."""
        # Decoders hold Python's lock for moments only, but each time that they want it they wait for as long as this
        # for a thread that computes; the default of 5 ms costs them a sixth of their speed.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        # What is here before the first batch stays: modules, the model. A full collection that looks at all of it stops
        # every thread for 0.3 s (docs/devlog.md).
        gc.collect()
        gc.freeze()
        self.start()
        try:
            due = self._next()
            while due is not None:
                ahead = None
                if self._stream is not None:
                    compute = torch.cuda.current_stream(self._device)
                    compute.wait_stream(self._stream)
                    due[0].frames.record_stream(compute)
                    if due[0].actions is not None:
                        due[0].actions.record_stream(compute)
                    if not self._queue.empty():
                        ahead = self._next()  # its copy starts now and runs beside this step
                yield due[0]
                due = ahead or self._next()
            if self._failure is not None:
                raise self._failure
        finally:
            gc.unfreeze()
            self.close()

    def close(self) -> None:
        """End the thread, also when it waits for room."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def _next(self) -> tuple[DeviceBatch, StepBatch] | None:
        """The next batch, on its way to the device, and the one in memory it comes from; None at the end."""
        if self._ended:
            return None
        started = time.perf_counter()
        self._meters.depth += self._queue.qsize()
        item = self._queue.get()
        self._meters.wait_seconds += time.perf_counter() - started
        if not isinstance(item, StepBatch):
            self._ended, self._failure = True, item
            return None
        self._meters.batches += 1
        actions = None if item.actions is None else self._to_device(item.actions)
        return DeviceBatch(item.step, self._to_device(item.frames), item.ids, item.places, actions), item

    def _to_device(self, array: np.ndarray) -> Tensor:
        """The array there, or on its way."""
        tensor = torch.from_numpy(array)
        if self._stream is None:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def _fill(self) -> None:
        last: BaseException | None = None  # the end of the queue
        try:
            for batch in self._batches:
                if not self._put(batch):
                    break
        except BaseException as error:  # noqa: BLE001 - raised again where the batches are asked for
            last = error
        finally:
            self._batches.close()
        self._put(last)

    def _put(self, item: StepBatch | BaseException | None) -> bool:
        """Whether it was taken before the prefetcher was closed."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False
