"""True actions through the feed on a real Ray: beside the same batches, whatever world, start and source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from flam_core.data.ingest import IngestOptions, ingest
from flam_core.data.shard import ACTION_COLUMNS, decode_actions, read_row_group
from flam_core.data.sources import IteratorSource
from flam_core.data.videos import VideoOptions
from flam_core.errors import DataError
from services.feed import CacheSettings, FeedPlan, StepBatch
from services.storage import resolve
from tests.services.feed_fixture import Batches, batches, feed, plan_of, source_of, upload

pytest_plugins = ("tests.services.feed_fixture",)
pytestmark = pytest.mark.timeout(600)

AGENTS = 4
"""As many as the grid has by default, each with an action of one number."""


def check_actions(plan: FeedPlan, ranks: list[list[StepBatch]], data: Path) -> None:
    """Every batch has the actions of its windows, as the shards of `data` hold them."""
    known: dict[tuple[object, ...], np.ndarray] = {}
    for rank, got in enumerate(ranks):
        for batch in got:
            frames = plan.stages[plan.stage_of(batch.step)[0]].clip_frames
            expected = []
            for clip, start in plan.windows(batch.step, rank):
                if clip not in known:
                    table = read_row_group(
                        LocalFileSystem(), f"{data}/{clip.shard}", clip.row_group, ("id", "frames", *ACTION_COLUMNS)
                    )
                    known[clip] = decode_actions(table.to_pylist()[clip.row], clip.shard)
                expected.append(known[clip][start : start + frames])
            assert batch.actions is not None
            assert batch.actions.shape == (*batch.frames.shape[:2], AGENTS, 1)
            assert batch.actions.dtype == np.float32
            np.testing.assert_array_equal(batch.actions, np.stack(expected))


@pytest.mark.parametrize(("world", "start", "decode"), [(2, 0, "worker"), (1, 7, "task")])
def test_actions_come_beside_the_same_batches(
    whole: Batches, small_data: Path, world: int, start: int, decode: str
) -> None:
    plan = plan_of(source_of(small_data), world=world, decode=decode, truth=True)
    got, _ = feed(plan, start)
    assert batches(got) == whole[start:]
    check_actions(plan, got, small_data)


def test_a_cache_filled_without_actions_does_not_hide_them(
    whole: Batches, s3_server: Callable[[], str], small_data: Path, tmp_path: Path
) -> None:
    place = resolve(f"s3://{s3_server()}/small")
    upload(small_data, place)
    cache, source = CacheSettings(str(tmp_path / "cache"), 1 << 30), source_of(place.uri)
    plan, plain = plan_of(source, truth=True), plan_of(source)
    from_bucket = []
    for one in (plain, plan, plan, plain):
        got, (meters,) = feed(one, cache=cache)
        assert batches(got) == whole
        from_bucket.append(meters.reading["bytes_read"] > 0)
        if one.truth:
            check_actions(plan, got, small_data)
        else:
            assert all(batch.actions is None for batch in got[0])
    assert from_bucket == [True, True, False, False]


def test_data_without_actions_stop_with_the_name_of_a_clip(connected: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = (rng.integers(0, 3, (40, 24, 24, 3), dtype=np.uint8) for _ in range(20))
    source = IteratorSource("bare", made, fps=10, video=VideoOptions(size=24))
    ingest(source, LocalFileSystem(), str(tmp_path / "bare"), options=IngestOptions(row_group_clips=2))
    said = r"shard shards/train\S+, clip bare-\d+:0: it has no actions\. Ingest the data with ground truth"
    with pytest.raises(DataError, match=said):
        feed(plan_of(source_of(tmp_path / "bare"), truth=True))
