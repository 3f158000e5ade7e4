"""Memory of batches that is used again, and Python's collector while a feed runs."""

from __future__ import annotations

import gc
from collections.abc import Generator

import numpy as np
import pytest
import torch

from services.feed import FeedMeters
from services.feed.assemble import Memory, StepBatch
from services.feed.prefetch import DevicePrefetcher, memory_for

CPU = torch.device("cpu")
PARTS = [np.full((1 << 18,), value, np.uint8) for value in range(4)]
"""Stacked they are 1 MiB, from which on memory is used again."""


def stack(memory: Memory, parts: list[np.ndarray]) -> np.ndarray:
    return np.stack(parts, out=memory((len(parts), *parts[0].shape), parts[0].dtype))


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nothing_looks_at_it() -> None:
    memory = memory_for(CPU)
    first = stack(memory, PARTS)
    where = address(first)
    assert address(stack(memory, PARTS)) != where
    del first
    assert where in {address(batch) for batch in [stack(memory, PARTS), stack(memory, PARTS)]}


@pytest.mark.parametrize(
    "view",
    [lambda a: a[1:], lambda a: torch.from_numpy(a)[1:], lambda a: torch.from_numpy(a).float()[1:], memoryview],
    ids=["slice", "tensor", "copy", "buffer"],
)
def test_what_is_made_of_a_batch_keeps_its_pixels(view) -> None:
    memory = memory_for(CPU)
    kept = view(stack(memory, PARTS))
    before = np.array(kept)
    others = [stack(memory, [255 - part for part in PARTS]) for _ in range(3)]
    np.testing.assert_array_equal(np.array(kept), before)
    assert len({address(other) for other in others}) == 3


def test_batches_of_other_sizes_and_types_follow_one_another() -> None:
    memory = memory_for(CPU)
    for parts in (PARTS, [part[:16] for part in PARTS], [part.astype(np.float32) for part in PARTS], PARTS[:2], PARTS):
        np.testing.assert_array_equal(stack(memory, parts), np.stack(parts))


def test_the_collector_forgets_nothing_after_a_feed() -> None:
    """While it runs, what was there before is not looked at; afterwards it is again, also if the feed was left."""

    def batches() -> Generator[StepBatch, None, None]:
        for step in range(3):
            yield StepBatch(step, np.zeros((1, 2, 4, 4, 3), np.uint8), ["a"], [0])

    for taken in (1, 3):
        feed = iter(DevicePrefetcher(batches(), CPU, FeedMeters(), batch_bytes=96))
        for _ in range(taken):
            next(feed)
        assert gc.get_freeze_count() > 0
        feed.close()  # type: ignore[attr-defined]
        assert gc.get_freeze_count() == 0
