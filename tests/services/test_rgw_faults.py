"""The feed's reading behind a proxy that spoils answers of Ceph's gateway, where signatures count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from flam_core.data.ingest import IngestOptions, ingest_world
from flam_core.errors import EnvironmentFault
from flam_core.worlds.grid import GridWorld
from services.feed import Assembler, FeedMeters, FeedPlan, FeedSource, StagePlan
from services.feed.read import Chunk, read_chunk
from services.storage import resolve
from tests.services.fault_proxy import FaultProxy, running_proxy
from tests.services.rgw_fixture import Gateway

pytestmark = pytest.mark.rgw
pytest_plugins = ("tests.services.rgw_fixture",)


@pytest.fixture
def proxy(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before it, and the owner's keys in the environment."""
    with running_proxy(gateway.endpoint) as running:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in gateway.environment(gateway.owner, AWS_ENDPOINT_URL=running.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", "5")
        yield running


@pytest.fixture
def plan(gateway: Gateway, proxy: FaultProxy) -> FeedPlan:
    """Of a small data set in a new bucket."""
    place = resolve(f"s3://{gateway.make_bucket()}/small")
    world = GridWorld(agents=2, frame_size=32)
    options = IngestOptions(row_group_clips=2)
    manifest = ingest_world(world, place.fs, place.path, episodes=20, frames=40, options=options).manifest
    return FeedPlan((FeedSource(place, manifest),), (StagePlan(12, 4, 5),), seed=0, world=1)


def read(plan: FeedPlan) -> tuple[list[tuple[tuple[str, ...], str]], FeedMeters]:
    """Ids and sha256 of the pixels of all batches, read in this process."""
    steps, meters = range(plan.total_steps), FeedMeters()
    table = read_chunk(plan, Chunk(0, steps, begins=True))
    assembler = Assembler(plan, 0, meters=meters)
    try:
        assembler.add(table["clips"].chunk(0)[0].values, table["counters"][0].as_py())
        found = [
            (tuple(batch.ids), hashlib.sha256(batch.frames.tobytes()).hexdigest()) for batch in assembler.batches(steps)
        ]
    finally:
        assembler.close()
    return found, meters


@pytest.mark.parametrize("faults", [("503", "slow down", "500"), ("cut", "", "cut"), ("429", "slow")])
def test_faults_that_pass_change_nothing(plan: FeedPlan, proxy: FaultProxy, faults: tuple[str, ...]) -> None:
    expected, _ = read(plan)
    proxy.clear()
    proxy.script(*faults * 3, method="GET")
    got, meters = read(plan)
    assert got == expected
    assert not proxy.pending
    assert sum(n for name, n in meters.reading.items() if name.startswith("retries_")) > 0


@pytest.mark.parametrize(("fault", "said"), [("503", "SERVICE_UNAVAILABLE"), ("403", "forbids access")])
def test_faults_that_stay_are_a_clear_stop(plan: FeedPlan, proxy: FaultProxy, fault: str, said: str) -> None:
    proxy.always(fault, method="GET")
    with pytest.raises(EnvironmentFault, match=said):
        read(plan)
