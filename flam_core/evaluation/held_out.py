"""Windows of held-out episodes, read straight from a data set's shards in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pyarrow.fs import FileSystem

from flam_core.data.manifest import Manifest, Shard
from flam_core.data.quarantine import BadClip, Quarantine
from flam_core.data.shard import FRAME_COLUMNS, TRUTH_COLUMNS, decode_clip, decode_truth, read_row_group
from flam_core.errors import DataError
from flam_core.evaluation.context import HeldOutClip

_COLUMNS = list(dict.fromkeys([*FRAME_COLUMNS, *TRUTH_COLUMNS]))


def held_out_clips(
    manifest: Manifest,
    fs: FileSystem,
    path: str,
    split: str,
    frames: int | None,
    limit: int,
    *,
    quarantine: Quarantine,
    on_broken: Callable[[BadClip], None],
) -> list[HeldOutClip]:
    """Up to `limit` windows of `frames` frames (None: whole clips) of a split, with what is known of them.

    The first window of every clip comes first, then the second of each, so that few windows are still of many episodes.
    Quarantined clips are left out; so is one that turns out to be broken, of which `on_broken` is told.
    """
    rounds: dict[int, list[HeldOutClip]] = {}
    for shard in manifest.split(split):
        for group in range(len(shard.row_groups)):
            if len(rounds.get(0, [])) >= limit:
                break
            for clip in _clips_of(fs, path, shard, group, frames, quarantine, on_broken):
                for number, window in enumerate(clip):
                    rounds.setdefault(number, []).append(window)
    ordered = [clip for number in sorted(rounds) for clip in rounds[number]]
    return ordered[:limit]


def _clips_of(
    fs: FileSystem,
    path: str,
    shard: Shard,
    group: int,
    frames: int | None,
    quarantine: Quarantine,
    on_broken: Callable[[BadClip], None],
) -> Iterator[list[HeldOutClip]]:
    """The windows of each clip of a row group."""
    first = sum(shard.row_groups[:group])
    rows = [row for row in range(shard.row_groups[group]) if first + row not in quarantine.rows(shard)]
    if not rows:
        return
    try:
        table = read_row_group(fs, f"{path}/{shard.name}", group, _COLUMNS)
        stored = {row: table.slice(row, 1).to_pylist()[0] for row in rows}
    except (DataError, IndexError) as error:  # fewer rows than the manifest says, say: then none can be trusted
        reason = error.what if isinstance(error, DataError) else f"shard {shard.name}, row group {group} lacks rows"
        for row in rows:
            on_broken(BadClip(shard.name, first + row, None, reason))
        return
    for row in rows:
        try:
            yield _windows(stored[row], shard.name, frames)
        except DataError as error:
            on_broken(BadClip(shard.name, first + row, stored[row]["id"], error.what))


def _windows(row: dict[str, Any], shard: str, frames: int | None) -> list[HeldOutClip]:
    pixels, truth = decode_clip(row, shard), decode_truth(row)
    frames = len(pixels) if frames is None else frames
    return [
        HeldOutClip(
            id=f"{row['id']}@{start}",
            episode=row["episode"],
            frames=pixels[start : start + frames],
            positions=None if truth is None or truth.positions is None else truth.positions[start : start + frames],
            actions=None if truth is None or truth.actions is None else truth.actions[start : start + frames],
        )
        for start in range(0, len(pixels) - frames + 1, frames)
    ]
