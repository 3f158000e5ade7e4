"""What the feed is measured against: other ways to get the same windows of the same clips, in whatever order."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flam_core.data.codec import get_codec
from flam_core.data.manifest import Manifest
from flam_core.data.shard import decode_clip, read_row_group
from services.storage import Location


def row_groups(manifest: Manifest) -> list[tuple[str, int]]:
    """All row groups of the train split, in order."""
    return [(shard.name, group) for shard in manifest.split("train") for group in range(len(shard.row_groups))]


def windows_of(data: Location, group: tuple[str, int], frames: int) -> Iterator[np.ndarray]:
    """The windows of a row group's clips, end to end, uint8 [frames, H, W, 3]."""
    table = read_row_group(data.fs, f"{data.path}/{group[0]}", group[1])
    for row in table.to_pylist():
        clip = decode_clip(row, group[0])
        for start in range(0, len(clip) - frames + 1, frames):
            yield clip[start : start + frames]


def plain_loop(
    data: Location, manifest: Manifest, frames: int, batch: int, cores: int
) -> Generator[np.ndarray, None, None]:
    """The ceiling: threads that read one row group after the other, and batches of what comes. For ever."""
    groups = row_groups(manifest)

    def batches(group: tuple[str, int]) -> list[np.ndarray]:
        windows = list(windows_of(data, group, frames))
        return [np.stack(windows[i : i + batch]) for i in range(0, len(windows) - batch + 1, batch)]

    with ThreadPoolExecutor(cores) as pool:
        waiting = [pool.submit(batches, groups[i % len(groups)]) for i in range(2 * cores)]
        turn = len(waiting)
        while True:
            done = waiting.pop(0).result()
            waiting.append(pool.submit(batches, groups[turn % len(groups)]))
            turn += 1
            yield from done


class _Windows(IterableDataset):
    def __init__(self, data: Location, manifest: Manifest, frames: int) -> None:
        self._data, self._groups, self._frames = data, row_groups(manifest), frames

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        mine = self._groups if info is None else self._groups[info.id :: info.num_workers]
        while True:
            for group in mine:
                for window in windows_of(self._data, group, self._frames):
                    yield torch.from_numpy(window.copy())


def torch_dataloader(
    data: Location, manifest: Manifest, frames: int, batch: int, cores: int
) -> Generator[np.ndarray, None, None]:
    """PyTorch's DataLoader with as many worker processes as cores, each with its share of the row groups. For ever."""
    loader = DataLoader(_Windows(data, manifest, frames), batch_size=batch, num_workers=cores, prefetch_factor=4)
    for frames_u8 in loader:
        yield frames_u8.numpy()


def webdataset_installed() -> bool:
    """Whether `webdataset` can be measured too."""
    return importlib.util.find_spec("webdataset") is not None


def write_tars(data: Location, manifest: Manifest, folder: Path) -> list[str]:
    """The train clips as tars for WebDataset, one per row group; their paths."""
    paths = []
    for number, (shard, group) in enumerate(row_groups(manifest)):
        path = folder / f"{number:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for row in read_row_group(data.fs, f"{data.path}/{shard}", group).to_pylist():
                shape = json.dumps({"codec": row["codec"], **{k: row[k] for k in ("frames", "height", "width")}})
                name = f"{shard.replace('/', '-').replace('.', '-')}-{group}-{len(tar.getnames()):06d}"
                for suffix, content in (("clip", row["payload"]), ("json", shape.encode())):
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        paths.append(str(path))
    return paths


def webdataset_loader(paths: list[str], frames: int, batch: int, cores: int) -> Generator[np.ndarray, None, None]:
    """WebDataset over tars of the same clips, with as many worker processes as cores. For ever."""
    webdataset: Any = importlib.import_module("webdataset")  # optional

    def cut(samples: Iterator[dict[str, bytes]]) -> Iterator[torch.Tensor]:
        for sample in samples:
            row = json.loads(sample["json"])
            clip = get_codec(row["codec"]).decode(sample["clip"], row["frames"], row["height"], row["width"])
            for start in range(0, len(clip) - frames + 1, frames):
                yield torch.from_numpy(clip[start : start + frames].copy())

    shards = webdataset.ResampledShards(paths)
    dataset = webdataset.DataPipeline(shards, webdataset.tarfile_to_samples(), cut)
    for frames_u8 in DataLoader(dataset, batch_size=batch, num_workers=cores, prefetch_factor=4):
        yield frames_u8.numpy()
