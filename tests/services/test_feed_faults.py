"""The feed behind a storage that has bad days: the same batches, or a clear stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flam_core.errors import EnvironmentFault
from services.feed import FeedMeters, FeedPlan
from services.storage import Location, resolve
from tests.services.fault_proxy import FaultProxy, running_proxy
from tests.services.feed_fixture import (
    Batches,
    batches,
    feed,
    plan_of,
    source_of,
    upload,
)

pytest_plugins = ("tests.services.feed_fixture",)
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def proxy(s3_server: Callable[[], str]) -> Iterator[FaultProxy]:
    """A proxy before the session's S3 server."""
    with running_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture(scope="module")
def stored(s3_server: Callable[[], str], small_data: Path) -> str:
    """The data set in a bucket."""
    place = resolve(f"s3://{s3_server()}/small")
    upload(small_data, place)
    return place.uri


@pytest.fixture
def behind(proxy: FaultProxy, stored: str, monkeypatch: pytest.MonkeyPatch) -> FeedPlan:
    """A plan for two ranks over that data set, as seen through the proxy; a request has five seconds."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", "5")
    proxy.clear()
    return plan_of(source_of(stored), world=2)


def retries(meters: list[FeedMeters]) -> float:
    return sum(n for one in meters for name, n in one.reading.items() if name.startswith("retries_"))


@pytest.mark.parametrize(
    "faults", [("503", "slow down", "500"), ("cut", "cut", ""), ("slow", "429", "slow"), ("", "403", "")]
)
def test_faults_that_pass_change_nothing(
    behind: FeedPlan,
    proxy: FaultProxy,
    whole: Batches,
    faults: tuple[str, ...],
) -> None:
    proxy.script(*faults * 4, method="GET")
    got, meters = feed(behind)
    assert batches(got) == whole
    assert not proxy.pending
    if set(faults) - {"slow", ""}:
        assert retries(meters) > 0


@pytest.mark.parametrize(("fault", "said"), [("503", "SERVICE_UNAVAILABLE"), ("403", "forbids access")])
def test_faults_that_stay_are_a_clear_stop(
    behind: FeedPlan,
    proxy: FaultProxy,
    connected: None,
    fault: str,
    said: str,
) -> None:
    proxy.always(fault, method="GET")
    with pytest.raises(EnvironmentFault) as raised:
        feed(behind)
    line = str(raised.value)
    assert said in line
    assert "\n" not in line


def test_a_plan_through_the_proxy_is_the_same_plan(behind: FeedPlan, small_data: Path) -> None:
    assert behind == plan_of(source_of(small_data), world=2)
    assert isinstance(behind.sources[0].data, Location)
