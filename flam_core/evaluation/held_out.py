"""Windows of held-out episodes, read straight from a data set's shards in their order."""

from __future__ import annotations

from pyarrow.fs import FileSystem

from flam_core.data.manifest import Manifest
from flam_core.data.shard import FRAME_COLUMNS, TRUTH_COLUMNS, decode_clip, decode_truth, read_row_group
from flam_core.evaluation.evaluate import HeldOutClip


def held_out_clips(
    manifest: Manifest, fs: FileSystem, path: str, split: str, frames: int, limit: int
) -> list[HeldOutClip]:
    """Up to `limit` windows of `frames` frames of a split, with what is known of them.

    The first window of every clip comes first, then the second of each, so that few windows are still of many episodes.
    Raises DataError for a broken shard.
    """
    rounds: dict[int, list[HeldOutClip]] = {}
    columns = list(dict.fromkeys([*FRAME_COLUMNS, *TRUTH_COLUMNS]))
    found = 0
    for shard in manifest.split(split):
        for group in range(len(shard.row_groups)):
            if found >= limit and len(rounds.get(0, [])) >= limit:
                break
            for row in read_row_group(fs, f"{path}/{shard.name}", group, columns).to_pylist():
                pixels = decode_clip(row, shard.name)
                truth = decode_truth(row)
                for number in range(len(pixels) // frames):
                    part = slice(number * frames, (number + 1) * frames)
                    clip = HeldOutClip(
                        id=f"{row['id']}@{part.start}",
                        episode=row["episode"],
                        frames=pixels[part],
                        positions=None if truth is None or truth.positions is None else truth.positions[part],
                        actions=None if truth is None or truth.actions is None else truth.actions[part],
                    )
                    rounds.setdefault(number, []).append(clip)
                    found += 1
    ordered = [clip for number in sorted(rounds) for clip in rounds[number]]
    return ordered[:limit]
