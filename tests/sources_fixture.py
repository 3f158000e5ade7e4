"""Real tar archives, Parquet files and LeRobot trees, and a reader of what an ingest made of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.stream import VideoStream
from PIL import Image
from pyarrow.fs import FileSystem, LocalFileSystem

from flam_core.data.ingest import IngestOptions, IngestReport, ingest
from flam_core.data.manifest import read_manifest
from flam_core.data.shard import FRAME_COLUMNS, TRUTH_COLUMNS, Truth, decode_clip, decode_truth, read_row_group
from flam_core.data.sources import Source
from flam_core.worlds.base import Episode
from flam_core.worlds.grid import GridWorld

FS = LocalFileSystem()
OPTIONS = IngestOptions(clip_frames=10, min_clip_frames=4, codec="zstd")


def episodes(count: int, frames: int = 24, size: int = 32) -> list[Episode]:
    """Episodes of two agents."""
    return list(GridWorld(agents=2, frame_size=size).episodes(count, frames, 0))


def video_bytes(frames: np.ndarray, fps: int = 10, form: str = "mp4") -> bytes:
    """A lossless H.264 video."""
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(form, form)) as container:
        _write(container, frames, fps)
    return file.getvalue()


def _write(container: Any, frames: np.ndarray, fps: int, gop: int = 12) -> None:
    stream = container.add_stream("libx264", rate=fps, options={"crf": "0", "g": str(gop)})
    assert isinstance(stream, VideoStream)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv444p"
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
        frame.pts, frame.time_base = index, Fraction(1, fps)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def image_bytes(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """A picture."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """An .npz member."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], mode: Any = "w") -> Path:
    """A tar archive of the members, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def truth_json(episode: Episode, **more: Any) -> bytes:
    """Ground truth of an episode as a .json member."""
    return json.dumps({"actions": episode.actions.tolist(), "positions": episode.positions.tolist(), **more}).encode()


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group: int = 7) -> Path:
    """A Parquet file of the rows, `group` of them in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def picture_rows(
    recorded: Sequence[Episode], name: str = "image", *, struct: bool = False, shuffle: bool = False
) -> list[dict[str, Any]]:
    """A row a frame of all episodes, in order of episodes, and in each of frames or not."""
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for i, episode in enumerate(recorded):
        order = rng.permutation(len(episode.frames)) if shuffle else np.arange(len(episode.frames))
        for t in order.tolist():
            content = image_bytes(episode.frames[t])
            rows.append(
                {
                    name: {"bytes": content, "path": f"{t}.png"} if struct else content,
                    "episode_index": i,
                    "frame_index": t,
                    "action": episode.actions[t].tolist(),
                    "positions": episode.positions[t].tolist(),
                    "reward": float(t),
                }
            )
    return rows


CAMERAS = ("observation.images.top", "observation.images.wrist")


@dataclass(frozen=True)
class LeRobotTree:
    """A LeRobot v3 data set: each camera shows its own episodes; the actions are those of the first camera's."""

    root: Path
    cameras: Mapping[str, Sequence[np.ndarray]]
    actions: Sequence[np.ndarray]
    """float32 [T, 3] an episode."""


def make_lerobot(root: Path, *, per_file: int = 3, count: int = 7, fps: int = 10, version: str = "v3.0") -> LeRobotTree:
    """Write `count` episodes of different lengths, `per_file` in an MP4 and in a Parquet file, of two cameras."""
    lengths = [12 + 3 * i for i in range(count)]
    shown = {
        camera: [
            next(GridWorld(agents=2, frame_size=32).episodes(1, n, 100 * c + i)).frames for i, n in enumerate(lengths)
        ]
        for c, camera in enumerate(CAMERAS)
    }
    rng = np.random.default_rng(0)
    actions = [rng.normal(size=(n, 3)).astype(np.float32) for n in lengths]
    rows = []
    for start in range(0, count, per_file):
        part, file = range(start, min(count, start + per_file)), start // per_file
        for camera in CAMERAS:
            path = root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
                _write(container, np.concatenate([shown[camera][i] for i in part]), fps)
        table = pa.table(
            {
                "observation.state": pa.array([[0.0] * 2 for i in part for _ in range(lengths[i])]),
                "action": pa.array([a for i in part for a in actions[i].tolist()], pa.list_(pa.float32(), 3)),
                "episode_index": [i for i in part for _ in range(lengths[i])],
                "frame_index": [t for i in part for t in range(lengths[i])],
                "next.reward": pa.array([float(t) for i in part for t in range(lengths[i])], pa.float32()),
            }
        )
        data = root / f"data/chunk-000/file-{file:03d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, data)
        for i in part:
            begun = sum(lengths[start:i]) / fps
            row: dict[str, Any] = {"episode_index": i, "length": lengths[i], "tasks": ["go"]}
            row |= {"data/chunk_index": 0, "data/file_index": file}
            for camera in CAMERAS:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
                row |= {
                    f"videos/{camera}/from_timestamp": begun,
                    f"videos/{camera}/to_timestamp": begun + lengths[i] / fps,
                }
            rows.append(row)
    meta = root / "meta/episodes/chunk-000/file-000.parquet"
    meta.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), meta)
    features: dict[str, Any] = {camera: {"dtype": "video", "shape": [32, 32, 3]} for camera in CAMERAS}
    features |= {"action": {"dtype": "float32", "shape": [3]}, "observation.state": {"dtype": "float32", "shape": [2]}}
    features |= {"next.reward": {"dtype": "float32", "shape": [1]}}
    info = {
        "codebase_version": version,
        "fps": fps,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return LeRobotTree(root, shown, actions)


@dataclass(frozen=True)
class Stored:
    """An episode read back from the shards."""

    split: str
    frames: np.ndarray
    fps: float
    truth: Truth | None
    """Of all its frames."""


def store(source: Source, path: Path, options: IngestOptions = OPTIONS) -> tuple[IngestReport, dict[str, Stored]]:
    """Ingest and read back by the manifest alone: what was reported, and the episodes by name."""
    report = ingest(source, FS, str(path), options=options)
    return report, dict(_stored(FS, str(path)))


def _stored(fs: FileSystem, path: str) -> Iterator[tuple[str, Stored]]:
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    columns = list(dict.fromkeys([*FRAME_COLUMNS, *TRUTH_COLUMNS]))
    for shard in read_manifest(fs, path).shards:
        for group in range(len(shard.row_groups)):
            for row in read_row_group(fs, f"{path}/{shard.name}", group, columns).to_pylist():
                parts.setdefault((row["episode"], shard.split), []).append(row)
    assert len({episode for episode, _ in parts}) == len(parts), "an episode is in two splits"
    for (episode, split), rows in parts.items():
        rows.sort(key=lambda row: row["start"])
        assert [row["start"] for row in rows] == list(np.cumsum([0, *(row["frames"] for row in rows[:-1])]))
        truths = [decode_truth(row) for row in rows]
        frames = np.concatenate([decode_clip(row, "") for row in rows])
        yield episode, Stored(split, frames, rows[0]["fps"], _joined(truths))


def _joined(truths: list[Truth | None]) -> Truth | None:
    known = [truth for truth in truths if truth is not None]
    if not known:
        return None
    assert len(known) == len(truths)
    fields = {}
    for name in ("actions", "positions", "rewards"):
        arrays = [getattr(truth, name) for truth in known]
        fields[name] = None if arrays[0] is None else np.concatenate(arrays)
    return Truth(**fields)
