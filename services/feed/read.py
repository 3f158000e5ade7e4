"""Reads the clips of a few steps, and decodes them where that is heavy: the body of a Ray Data task."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from flam_core.data.codec import Raw
from flam_core.data.shard import ACTION_COLUMNS, FRAME_COLUMNS, decode_clip, read_row_group
from flam_core.errors import DataError, EnvironmentFault, FlamError, pack
from services.feed.plan import ClipUse, FeedPlan
from services.storage import Location, counters
from services.storage.cache import BlockCache
from services.storage.faults import storage_fault

_CLIP = pa.struct(
    [
        pa.field("source", pa.int32()),
        pa.field("shard", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("uses", pa.int32()),
        pa.field("id", pa.string()),
        pa.field("frames", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("codec", pa.string()),
        pa.field("crc32", pa.int64()),
        pa.field("payload", pa.large_binary()),
        pa.field("error", pa.string()),  # why this clip cannot be had
    ]
)
_CLIP_WITH_ACTIONS = pa.struct(
    [
        *_CLIP,
        pa.field("entities", pa.int32()),
        pa.field("action_size", pa.int32()),
        pa.field("actions", pa.list_(pa.float32())),  # [frames, entities, action_size], flat
    ]
)


def schema(plan: FeedPlan) -> pa.Schema:
    """Of what a read task gives: one row."""
    return pa.schema(
        [
            pa.field("first_step", pa.int64()),
            pa.field("rank", pa.int32()),
            pa.field("clips", pa.list_(_clip(plan))),
            pa.field("counters", pa.string()),  # JSON: what reading took
            pa.field("error", pa.string()),  # instead of clips, if none can be had: a packed FlamError
        ]
    )


def _clip(plan: FeedPlan) -> pa.StructType:
    return _CLIP_WITH_ACTIONS if plan.truth else _CLIP


_READERS = 8
"""Row groups that a task reads from a bucket at a time."""


class Chunk(NamedTuple):
    """What one task serves: clips for some steps of one rank."""

    rank: int
    steps: range
    begins: bool
    """It is the first one of the execution, so the rank holds no clips yet."""


def read_or_say(plan: FeedPlan, chunk: Chunk, cache: BlockCache | None) -> pa.Table:
    """`read_chunk`, or one row that says why not: raised, the error would reach the trainer as text of Ray's only."""
    try:
        return read_chunk(plan, chunk, cache)
    except FlamError as error:
        return _table(plan, chunk, pa.nulls(0, _clip(plan)), {}, pack(error))


def read_chunk(plan: FeedPlan, chunk: Chunk, cache: BlockCache | None = None) -> pa.Table:
    """One row with all clips that the rank must get before the steps of `chunk`. Each row group is read once.

    A clip that is broken, or whose shard is, comes with its `error` and no payload. Raises EnvironmentFault if the
    storage does not answer.
    """
    started, before = time.perf_counter(), counters.snapshot()
    groups: dict[tuple[int, str, int], list[ClipUse]] = defaultdict(list)
    for use in plan.clips(chunk.steps, chunk.rank, begins=chunk.begins):
        groups[use.clip[:3]].append(use)

    def read(item: tuple[tuple[int, str, int], list[ClipUse]]) -> tuple[pa.StructArray, int]:
        (source, shard, group), uses = item
        return _read_group(plan, source, shard, group, uses, cache)

    if all(source.data.local for source in plan.sources):
        parts = [read(item) for item in groups.items()]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(read, groups.items()))
    used = counters.difference(counters.snapshot(), before)
    clips = pa.concat_arrays([clips for clips, _ in parts]) if parts else pa.nulls(0, _clip(plan))
    used |= {
        "frames": sum(n or 0 for n in clips.field("frames").to_pylist()),
        "group_bytes": sum(size for _, size in parts),
        "task_seconds": time.perf_counter() - started,
    }
    return _table(plan, chunk, clips, used, None)


def _table(plan: FeedPlan, chunk: Chunk, clips: pa.Array, used: dict[str, float], error: str | None) -> pa.Table:
    columns = [
        pa.array([chunk.steps.start], pa.int64()),
        pa.array([chunk.rank], pa.int32()),
        pa.ListArray.from_arrays(pa.array([0, len(clips)], pa.int32()), clips),
        pa.array([json.dumps(used)]),
        pa.array([error], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=schema(plan))


def _read_group(
    plan: FeedPlan, source: int, shard: str, group: int, uses: list[ClipUse], cache: BlockCache | None
) -> tuple[pa.StructArray, int]:
    """The clips of one row group that are asked for, decoded if that is for tasks to do, and the group's bytes."""
    data = plan.sources[source].data.unchanging()  # shards are named by their hash
    rows, clip = [use.clip.row for use in uses], _clip(plan)
    wanted = FRAME_COLUMNS + ACTION_COLUMNS if plan.truth else FRAME_COLUMNS
    try:
        if cache is None:
            table = _fetch(data, shard, group, wanted)
        else:
            # A shard's name ends with its hash, so the name says what is in it, wherever it lies.
            key = f"{shard}/{group}/actions" if plan.truth else f"{shard}/{group}"
            table = cache.get_or_fetch(key, lambda: _fetch(data, shard, group, wanted))
        # All of a group in order is the common case of few ranks, and needs no copy.
        taken = table if rows == list(range(len(table))) else table.take(pa.array(rows))
        taken = taken.combine_chunks()
    except (DataError, IndexError, pa.ArrowInvalid) as error:
        reason = error.what if isinstance(error, DataError) else f"shard {shard}, row group {group}: {error}"
        return _struct(clip, source, shard, group, uses, {}, [reason] * len(uses)), 0
    names = {field.name for field in clip}
    columns = {name: taken[name].combine_chunks() for name in taken.column_names if name in names}
    errors: list[str | None] = [None] * len(uses)
    if plan.decodes_in_tasks(source):
        columns, errors = _decoded(taken, columns, shard)
    return _struct(clip, source, shard, group, uses, columns, errors), table.nbytes


def _fetch(data: Location, shard: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    try:
        return read_row_group(data.fs, f"{data.path}/{shard}", group, columns)
    except EnvironmentFault as error:
        if isinstance(error.__cause__, OSError):  # storage knows better what it means
            raise storage_fault(error.__cause__, f"{data.uri}/{shard}") from error
        raise


def _decoded(taken: pa.Table, columns: dict[str, pa.Array], shard: str) -> tuple[dict[str, pa.Array], list[str | None]]:
    """The columns with pixels for payloads, and what is wrong with each clip."""
    payloads: list[np.ndarray | None] = []
    errors: list[str | None] = []
    for row in taken.select(list(FRAME_COLUMNS)).to_pylist():
        try:
            payloads.append(decode_clip(row, shard).reshape(-1))
            errors.append(None)
        except DataError as error:
            payloads.append(None)
            errors.append(error.what)
    sizes = [0 if pixels is None else len(pixels) for pixels in payloads]
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    pixels = np.concatenate([p for p in payloads if p is not None] or [np.empty(0, np.uint8)])
    packed = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(sizes), [None, offsets.buffers()[1], pa.py_buffer(pixels)]
    )
    raw = pa.array([Raw.name] * len(sizes), pa.string())
    return {**columns, "codec": raw, "payload": packed}, errors


def _struct(
    clip: pa.StructType,
    source: int,
    shard: str,
    group: int,
    uses: list[ClipUse],
    columns: dict[str, pa.Array],
    errors: list[str | None],
) -> pa.StructArray:
    n = len(uses)
    given = {
        "source": pa.array([source] * n, pa.int32()),
        "shard": pa.array([shard] * n, pa.string()),
        "row_group": pa.array([group] * n, pa.int32()),
        "row": pa.array([use.clip.row for use in uses], pa.int32()),
        "uses": pa.array([use.uses for use in uses], pa.int32()),
        "error": pa.array(errors, pa.string()),
        **columns,
    }
    return pa.StructArray.from_arrays(
        [given[f.name].cast(f.type) if f.name in given else pa.nulls(n, f.type) for f in clip], fields=list(clip)
    )
