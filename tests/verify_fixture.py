"""Data sets to spoil, and how they are spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from flam_core.data.codec import Zstd
from flam_core.data.ingest import IngestOptions, ingest_world
from flam_core.data.manifest import Manifest, Shard, read_manifest, write_manifest
from flam_core.data.quarantine import Quarantine
from flam_core.data.shard import Clip, ShardWriter, Truth, encode_clip, read_row_group
from flam_core.data.verify import verify_data
from flam_core.worlds.grid import GridWorld

FS = LocalFileSystem()
OPTIONS = IngestOptions(clip_frames=12, min_clip_frames=4, row_group_clips=4)
CHANGED = "the file has changed, its sha256 is not the manifest's"


def train(data: Path) -> Shard:
    (shard,) = read_manifest(FS, str(data)).split("train")
    return shard


def verify(data: Path) -> Quarantine:
    return verify_data(FS, str(data), workers=2).quarantine


def rows(data: Path, shard: Shard) -> list[dict[str, Any]]:
    groups = range(len(shard.row_groups))
    return [row for group in groups for row in read_row_group(FS, f"{data}/{shard.name}", group).to_pylist()]


def spoil(data: Path, shard: Shard, at: int, size: int = 1) -> None:
    """Flip all bits of some bytes."""
    content = bytearray((data / shard.name).read_bytes())
    content[at : at + size] = (byte ^ 255 for byte in content[at : at + size])
    (data / shard.name).write_bytes(content)


def spoil_clip(data: Path, shard: Shard, row: int) -> None:
    payload = rows(data, shard)[row]["payload"]
    spoil(data, shard, (data / shard.name).read_bytes().index(payload) + len(payload) // 2)


def make_grid(path: Path) -> Path:
    """A data set of 32 clips in three shards; the one of train has six row groups."""
    ingest_world(GridWorld(agents=2, frame_size=32), FS, str(path), episodes=16, frames=24, options=OPTIONS)
    return path


def clip(index: int, size: int = 16, rate: float = 5.0, truth: bool = True) -> Clip:
    rng = np.random.default_rng(index)
    frames = rng.integers(0, 2, size=(6, size, size, 3), dtype=np.uint8)
    known = Truth(
        rng.random((6, 2, 3)).astype(np.float32),
        rng.random((6, 2, 2)).astype(np.float32),
        np.zeros(6, np.float32),
    )
    return Clip(f"episode {index}", 0, frames, rate, known if truth else None)


def changed(row: pa.RecordBatch, **values: Any) -> pa.RecordBatch:
    """A row with other values in some columns."""
    for name, value in values.items():
        at = row.schema.get_field_index(name)
        row = row.set_column(at, row.schema.field(at), pa.array([value], type=row.schema.field(at).type))
    return row


def store(path: Path, batches: list[pa.RecordBatch], held_out: pa.RecordBatch | None = None, **values: Any) -> Manifest:
    """A data set whose train shard has these rows, the others one each; its hashes are right."""
    others = [encode_clip(clip(99), Zstd()) if held_out is None else held_out]
    (path / "shards").mkdir(parents=True)
    shards = []
    for split in ("train", "val", "test"):
        writer = ShardWriter(FS, str(path / "shards"), split, row_group_clips=2)
        for batch in batches if split == "train" else others:
            writer.write(batch)
        for written in writer.close():
            Path(written.path).rename(path / written.shard.name)
            shards.append(written.shard)
    manifest = Manifest(
        **{
            "name": "test",
            "source": "test",
            "licence": "MIT",
            "settings": {},
            "codec": "zstd",
            "frame_size": (16, 16),
            "fps": 5.0,
            "has_truth": True,
            "episodes": {"train": 3, "val": 1, "test": 1},
            "clips": sum(shard.clips for shard in shards),
            "frames": sum(shard.frames for shard in shards),
            "shards": tuple(shards),
            **values,
        }
    )
    write_manifest(FS, str(path), manifest)
    return manifest
