"""Reads a data set back, for tests of what wrote it."""

from __future__ import annotations

import numpy as np
from pyarrow.fs import FileSystem

from flam_core.data.manifest import read_manifest
from flam_core.data.shard import decode_clip, read_row_group, verify_shard


def stored(fs: FileSystem, path: str) -> dict[str, tuple[str, np.ndarray]]:
    """Split and frames of each clip, read by the manifest alone."""
    manifest = read_manifest(fs, path)
    found = {}
    for shard in manifest.shards:
        lengths: list[int] = []
        verify_shard(fs, path, shard)
        for group, clips in enumerate(shard.row_groups):
            rows = read_row_group(fs, f"{path}/{shard.name}", group).to_pylist()
            assert len(rows) == clips
            for row in rows:
                assert row["id"] not in found
                found[row["id"]] = (shard.split, decode_clip(row, shard.name))
                lengths.append(row["frames"])
        assert tuple(lengths) == shard.clip_frames
    return found
