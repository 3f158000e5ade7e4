"""Reads and decodes the windows of a few steps: the body of a Ray Data task."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa

from flam_core.data.order import Window
from flam_core.data.shard import decode_clip, read_row_group
from flam_core.errors import DataError, FlamError, pack
from services.feed.plan import FeedPlan
from services.storage import Location

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("shape", pa.list_(pa.int32(), 5)),  # [B, T, H, W, 3]
        pa.field("frames", pa.large_binary()),  # uint8, contiguous
        pa.field("ids", pa.list_(pa.string())),  # of the windows
        pa.field("error", pa.string()),  # instead of frames, if they cannot be had: a packed FlamError
    ]
)


def read_or_say(plan: FeedPlan, rank: int, steps: range) -> pa.Table:
    """`read_steps`, or one row that says why not: raised, the error would reach the trainer as text of Ray's only."""
    try:
        return read_steps(plan, rank, steps)
    except FlamError as error:
        return pa.Table.from_pylist([{"step": steps.start, "rank": rank, "error": pack(error)}], schema=SCHEMA)


def read_steps(plan: FeedPlan, rank: int, steps: range) -> pa.Table:
    """One row a step with the frames that `rank` trains on, in order.

    Each clip is decoded once, however many windows of it the steps need. Raises DataError for a broken clip.
    """
    needed = {step: plan.windows(step, rank) for step in steps}
    clips: dict[tuple[str, int, int], np.ndarray] = {}
    for shard, group, row in sorted({(w.shard, w.row_group, w.row) for ws in needed.values() for w in ws}):
        table = _row_group(plan.data, shard, group)
        clips[shard, group, row] = decode_clip(table.slice(row, 1).to_pylist()[0], shard)
    return pa.Table.from_pylist([_row(plan, rank, step, needed[step], clips) for step in steps], schema=SCHEMA)


def _row(
    plan: FeedPlan, rank: int, step: int, windows: list[Window], clips: dict[tuple[str, int, int], np.ndarray]
) -> dict[str, object]:
    length = plan.stages[plan.stage_of(step)[0]].clip_frames
    frames = np.stack([clips[w.shard, w.row_group, w.row][w.start : w.start + length] for w in windows])
    if frames.shape[2:4] != plan.manifest.frame_size:
        raise DataError(
            f"data set {plan.data}: frames are {frames.shape[2:4]}, the manifest says {plan.manifest.frame_size}",
            fix="Ingest the data set again.",
        )
    ids = [w.id for w in windows]
    return {"step": step, "rank": rank, "shape": list(frames.shape), "frames": frames.tobytes(), "ids": ids}


@lru_cache(maxsize=8)  # encoded row groups of 4-8 MB: what a shuffled block of the sample order needs, kept by the task
def _row_group(data: Location, shard: str, group: int) -> pa.Table:
    return read_row_group(data.fs, f"{data.path}/{shard}", group)
