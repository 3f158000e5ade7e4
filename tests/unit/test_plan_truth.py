"""True actions through the feed, in this process: only on demand, in step with the frames, and never half of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from flam_core.data.codec import Zstd
from flam_core.data.ingest import IngestOptions, ingest, ingest_world
from flam_core.data.manifest import read_manifest
from flam_core.data.shard import (
    ACTION_COLUMNS,
    FRAME_COLUMNS,
    Clip,
    Truth,
    decode_actions,
    decode_truth,
    encode_clip,
    read_row_group,
)
from flam_core.data.sources import AnyEpisode, IteratorSource
from flam_core.data.videos import VideoOptions
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from flam_core.worlds.grid import GridWorld
from services.feed import Assembler, FeedMeters, FeedPlan, FeedSource, StagePlan, StepBatch
from services.feed.prefetch import DevicePrefetcher, memory_for
from services.feed.read import Chunk, read_chunk
from services.storage import BlockCache, resolve

# The prefetcher ignores it too, but pytest sets the filters anew for each test.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

FS = LocalFileSystem()
STAGES = (StagePlan(3, 4, 5), StagePlan(12, 4, 7, window_stride=3))
SIZE = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen clips of three agents to train on, in groups of two."""
    folder = tmp_path_factory.mktemp("truth") / "grid"
    world = GridWorld(agents=3, cells=6, frame_size=SIZE, stay=0.6)
    ingest_world(world, FS, str(folder), episodes=20, frames=40, options=IngestOptions(row_group_clips=2))
    return folder


def plan_of(*places: Path, stages: tuple[StagePlan, ...] = STAGES, **more: Any) -> FeedPlan:
    sources = tuple(FeedSource(resolve(place), read_manifest(FS, str(place))) for place in places)
    return FeedPlan(sources, stages, seed=1, world=more.pop("world", 1), **more)


def read(plan: FeedPlan, *, cache: BlockCache | None = None, **more: Any) -> list[StepBatch]:
    """All batches of a plan of one rank."""
    steps = range(plan.total_steps)
    table = read_chunk(plan, Chunk(0, steps, begins=True), cache)
    assembler = Assembler(plan, 0, threads=2, **more)
    try:
        assembler.add(table["clips"].chunk(0)[0].values, table["counters"][0].as_py())
        return list(assembler.batches(steps))
    finally:
        assembler.close()


def actions_of(plan: FeedPlan, step: int) -> np.ndarray:
    """Those of a step's windows, read from the shards without the feed."""
    stage, found = plan.stages[plan.stage_of(step)[0]], []
    for window in plan.windows(step, 0):
        file = Path(plan.sources[window.clip.source].data.path, window.clip.shard)
        truth = decode_truth(pq.ParquetFile(file).read_row_group(window.clip.row_group).to_pylist()[window.clip.row])
        assert truth is not None
        assert truth.actions is not None
        found.append(truth.actions[window.start : window.start + stage.clip_frames])
    return np.stack(found)


def same(one: list[StepBatch], other: list[StepBatch]) -> bool:
    """Whether two feeds gave the same steps, windows and pixels."""
    return [(b.step, b.ids, b.frames.tobytes()) for b in one] == [(b.step, b.ids, b.frames.tobytes()) for b in other]


def episodes(count: int = 12, entities: int = 2) -> Iterator[tuple[np.ndarray, Truth]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        frames = rng.integers(0, 3, (20, SIZE, SIZE, 3), dtype=np.uint8)
        yield frames, Truth(actions=rng.normal(size=(20, entities, 2)).astype(np.float32))


def stored(folder: Path, made: Iterator[AnyEpisode] | list[AnyEpisode]) -> Path:
    source = IteratorSource("made", made, fps=10, video=VideoOptions(size=SIZE))
    ingest(source, FS, str(folder), options=IngestOptions(row_group_clips=2))
    return folder


@pytest.mark.parametrize("decode", ["worker", "task"])
@pytest.mark.parametrize("memory", [np.empty, memory_for(torch.device("cpu"))])
def test_actions_come_in_step_with_frames_that_stay_as_they_were(data: Path, decode: Any, memory: Any) -> None:
    plan = plan_of(data, decode=decode, truth=True)
    got = read(plan, memory=memory)
    assert same(got, read(plan_of(data, decode=decode)))
    for batch in got:
        assert batch.actions is not None
        assert batch.actions.dtype == np.float32
        assert batch.actions.shape == (*batch.frames.shape[:2], 3, 1)
        np.testing.assert_array_equal(batch.actions, actions_of(plan, batch.step))
    # Actions differ from window to window, so that equality above is no accident.
    assert len({batch.actions.tobytes() for batch in got if batch.actions is not None}) == len(got)


def test_an_action_leads_to_the_next_frame(data: Path) -> None:
    """Where all agents stay the picture does, and a frame earlier or later this does not hold."""
    still, acting = [], []
    for batch in read(plan_of(data, truth=True)):
        assert batch.actions is not None
        still.append((batch.frames[:, 1:] == batch.frames[:, :-1]).all(axis=(2, 3, 4)).ravel())
        acting.append((batch.actions != 0).any(axis=(2, 3)))
    told_to_stay = ~np.concatenate([acts[:, :-1].ravel() for acts in acting])
    assert told_to_stay.sum() > 20
    assert np.concatenate(still)[told_to_stay].all()
    a_frame_on = ~np.concatenate([acts[:, 1:].ravel() for acts in acting])
    assert not np.concatenate(still)[a_frame_on].all()


def test_without_truth_no_actions_come_and_their_column_is_not_read(data: Path, tmp_path: Path) -> None:
    """Bytes of the actions that are damaged are not seen by who does not read them."""
    plan = plan_of(data)
    assert all(batch.actions is None for batch in read(plan))
    for shard in plan.sources[0].manifest.shards:
        target = tmp_path / shard.name
        target.parent.mkdir(exist_ok=True)
        content = bytearray((data / shard.name).read_bytes())
        metadata = pq.ParquetFile(data / shard.name).metadata
        for group in range(metadata.num_row_groups):
            (chunk,) = (
                column
                for column in map(metadata.row_group(group).column, range(metadata.num_columns))
                if column.path_in_schema.startswith("actions")
            )
            start = chunk.data_page_offset
            content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
        target.write_bytes(content)
    (tmp_path / "manifest.json").write_bytes((data / "manifest.json").read_bytes())
    assert same(read(plan_of(tmp_path)), read(plan))
    with pytest.raises(EnvironmentFault, match="page header"):
        read(plan_of(tmp_path, truth=True))


def test_what_travels_holds_actions_only_on_demand(data: Path) -> None:
    steps = range(15)
    off, on = (read_chunk(plan_of(data, truth=truth), Chunk(0, steps, begins=True)) for truth in (False, True))
    frame_fields = [field.name for field in off.schema.field("clips").type.value_type]
    assert set(frame_fields).isdisjoint(ACTION_COLUMNS)
    assert [field.name for field in on.schema.field("clips").type.value_type] == [*frame_fields, *ACTION_COLUMNS]


def test_one_cache_serves_both(data: Path, tmp_path: Path) -> None:
    """Whoever comes first: a row group with actions is not the one without."""
    for first in (False, True):
        cache = BlockCache(tmp_path / str(first), 1 << 30)
        for truth in (first, not first, first):
            plan = plan_of(data, truth=truth)
            got = read(plan, cache=cache)
            assert same(got, read(plan))
            for batch in got:
                assert (batch.actions is not None) == truth
                if batch.actions is not None:
                    np.testing.assert_array_equal(batch.actions, actions_of(plan, batch.step))


def test_a_plan_with_truth_is_another_plan_of_the_same_windows(data: Path) -> None:
    on, off = plan_of(data, truth=True), plan_of(data)
    assert on != off
    assert on.key != off.key
    assert on == plan_of(data, truth=True)
    assert on.windows_of(range(15), 0) == off.windows_of(range(15), 0)


@pytest.mark.parametrize("skipping", [0, 1])
def test_frames_must_not_be_skipped(data: Path, skipping: int) -> None:
    stages = tuple(StagePlan(3, 4, 5, frame_skip=2 if stage == skipping else 1) for stage in range(2))
    with pytest.raises(SettingsError, match=r"frame_skip 2 with true actions.*Use frame_skip 1"):
        plan_of(data, stages=stages, truth=True)
    assert len(read(plan_of(data, stages=stages))) == 6


def test_actions_not_known_come_as_nan(tmp_path: Path) -> None:
    made = list(episodes())
    for _, truth in made:
        assert truth.actions is not None
        truth.actions[:, 1] = np.nan
    (batch, *_) = read(plan_of(stored(tmp_path / "a", made), truth=True))
    assert batch.actions is not None
    assert np.isnan(batch.actions[:, :, 1]).all()
    assert np.isfinite(batch.actions[:, :, 0]).all()


def test_a_clip_without_actions_is_named(tmp_path: Path) -> None:
    made: list[AnyEpisode] = [
        frames if number == 4 else (frames, truth) for number, (frames, truth) in enumerate(episodes())
    ]
    place = stored(tmp_path / "a", made)
    clips = [
        (shard.name, row["id"])
        for shard in read_manifest(FS, str(place)).split("train")
        for group in range(len(shard.row_groups))
        for row in read_row_group(FS, f"{place}/{shard.name}", group).to_pylist()
        if row["episode"].endswith("00000004")
    ]
    ((shard, clip),) = clips
    with pytest.raises(DataError, match=f"shard {shard}, clip {clip}: it has no actions.*with ground truth"):
        read(plan_of(place, truth=True))
    assert len(read(plan_of(place))) == 15


def test_other_entities_than_the_first_clip_has_are_named(tmp_path: Path) -> None:
    places = stored(tmp_path / "two", episodes()), stored(tmp_path / "three", episodes(entities=3))
    said = r"shard shards/train\S+, clip made-\d+:0: actions of \(entities, numbers\) \(\d, 2\), but \(\d, 2\) in shard"
    with pytest.raises(DataError, match=said):
        read(plan_of(*places, truth=True))
    assert len(read(plan_of(*places))) == 15


def test_windows_of_a_broken_clip_take_their_actions_with_them(data: Path, tmp_path: Path) -> None:
    (shard,) = read_manifest(FS, str(data)).split("train")
    for file in (*(data / "shards").iterdir(), data / "manifest.json"):
        target = tmp_path / file.relative_to(data)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    payload = read_row_group(FS, f"{data}/{shard.name}", 1).to_pylist()[1]["payload"]
    content = bytearray((data / shard.name).read_bytes())
    content[content.index(payload) + len(payload) // 2] ^= 1
    (tmp_path / shard.name).write_bytes(content)
    for decode in ("worker", "task"):
        plan = plan_of(tmp_path, truth=True, decode=decode)
        got, left_out = read(plan), 0
        for batch in got:
            kept = [window.clip[2:] != (1, 1) for window in plan.windows(batch.step, 0)]
            assert batch.actions is not None
            assert len(batch.actions) == len(batch.frames) == len(batch.ids) == sum(kept)
            np.testing.assert_array_equal(batch.actions, actions_of(plan, batch.step)[kept])
            left_out += kept.count(False)
        assert left_out > 0


@pytest.mark.parametrize("truth", [False, True])
def test_the_prefetcher_carries_actions(data: Path, truth: bool) -> None:
    plan, device = plan_of(data, truth=truth), torch.device("cpu")
    expected = read(plan)
    batches = (batch for batch in read(plan, memory=memory_for(device)))
    got = list(DevicePrefetcher(batches, device, FeedMeters(), plan.batch_bytes))
    assert len(got) == len(expected)
    for batch, known in zip(got, expected, strict=True):
        np.testing.assert_array_equal(batch.frames.numpy(), known.frames)
        assert (batch.actions is not None) == truth
        if batch.actions is not None:
            assert batch.actions.dtype == torch.float32
            np.testing.assert_array_equal(batch.actions.numpy(), known.actions)


def test_decode_actions() -> None:
    actions = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    columns = [*FRAME_COLUMNS, *ACTION_COLUMNS]
    (row,) = encode_clip(Clip("e", 0, frames, 8.0, Truth(actions=actions)), Zstd()).select(columns).to_pylist()
    np.testing.assert_array_equal(decode_actions(row, "s"), actions)
    assert decode_actions(row, "s").dtype == np.float32
    with pytest.raises(DataError, match=r"shard s, clip e:0: 11 numbers are not actions of shape \(3, 2, 2\)"):
        decode_actions(row | {"actions": row["actions"][1:]}, "s")
    for truth in (None, Truth(positions=np.zeros((3, 2, 2), np.float32))):
        (bare,) = encode_clip(Clip("e", 0, frames, 8.0, truth), Zstd()).select(columns).to_pylist()
        with pytest.raises(DataError, match="shard s, clip e:0: it has no actions"):
            decode_actions(bare, "s")
