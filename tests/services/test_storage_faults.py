"""A storage on bad days: what is read is what was written, or the error is clear and comes in time."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem, copy_files

from flam_core.data.shard import read_row_group
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from services.storage import Location, counters, exists, read_bytes, resolve, write_bytes
from services.storage.s3 import WHOLE_BYTES
from tests.services.conftest import free_ports
from tests.services.fault_proxy import FaultProxy, running_proxy

pytestmark = pytest.mark.timeout(120)

PASSING = {
    "500": "server",
    "503": "throttled",
    "slow down": "throttled",
    "429": "throttled",
    "cut": "cut",
    "reset": "connection",
    "hang": "timeout",
}
"""Faults that pass, and what they are counted as."""
CONTENT = np.random.default_rng(0).bytes(100_000)
NUMBERS = pa.table({"id": pa.array(range(64), pa.int64()), "payload": pa.array([CONTENT] * 64, pa.large_binary())})


@pytest.fixture(scope="module")
def proxy(s3_server: Callable[[], str]) -> Iterator[FaultProxy]:
    """A proxy before the session's S3 server."""
    with running_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture
def place(proxy: FaultProxy, s3_server: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Location:
    """A prefix in a new bucket behind the proxy, with the object `known` in it; a request has five seconds."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", "5")
    proxy.clear()
    location = resolve(f"s3://{s3_server()}/a")
    write_bytes(location / "known", CONTENT)
    proxy.clear()
    return location


@pytest.fixture
def impatient(place: Location, monkeypatch: pytest.MonkeyPatch) -> Location:
    """The same place; a request has one second and a half."""
    monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", "1.5")
    return resolve(place.uri)


class Counted:
    """What a block of code counted."""

    def __enter__(self) -> Counted:
        self._before = counters.snapshot()
        return self

    def __exit__(self, *_: object) -> None:
        self.totals = counters.difference(counters.snapshot(), self._before)

    def __getitem__(self, name: str) -> float:
        return self.totals[name]


def write_shard(where: Location, groups: int = 4) -> pa.Table:
    """A Parquet file of 6.4 MB, laid out as shards are."""
    with where.fs.open_output_stream(where.path) as sink:
        pq.write_table(NUMBERS, sink, row_group_size=64 // groups, compression="none", use_dictionary=False)
    return NUMBERS


def group_of(where: Location, group: int) -> pa.Table:
    return read_row_group(where.fs, where.path, group, columns=("id", "payload"))


# Faults that pass


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing_that_is_read(place: Location, proxy: FaultProxy, fault: str) -> None:
    repeats = 1 if fault == "hang" else 2
    proxy.script(*[fault] * repeats, method="GET")
    with Counted() as counted:
        assert read_bytes(place / "known") == CONTENT
    assert not proxy.pending
    # A reset connection that was used before is opened again by the HTTP library itself, uncounted.
    assert counted[f"retries_{PASSING[fault]}"] in ((repeats - 1, repeats) if fault == "reset" else (repeats,))
    assert counted["bytes_read"] == len(CONTENT)
    assert counted["requests"] == 2 + sum(counted[f"retries_{kind}"] for kind in counters.RETRY_KINDS)
    assert (counted["wait_seconds"] > 0) == (counted["requests"] > 2)
    assert counted["gave_up"] == 0


@pytest.mark.parametrize("fault", ["500", "503", "slow down", "429"])
def test_a_fault_that_passes_does_not_keep_an_object_from_being_written(
    place: Location, proxy: FaultProxy, fault: str
) -> None:
    proxy.script(fault, method="PUT")
    with Counted() as counted:
        write_bytes(place / "new", b"new")
    assert counted[f"retries_{PASSING[fault]}"] == 1
    assert counted["bytes_written"] == 3
    assert read_bytes(place / "new") == b"new"


def test_faults_in_other_requests_pass_too(place: Location, proxy: FaultProxy) -> None:
    proxy.script("503", "", "500", method="HEAD")
    assert exists(place / "known")
    assert not exists(place / "none")
    proxy.script("503", method="PUT")
    place.fs.move((place / "known").path, (place / "moved").path)
    proxy.script("500", method="DELETE")
    place.fs.delete_file((place / "moved").path)
    assert not proxy.pending
    assert not exists(place / "moved")


def test_a_slow_answer_is_waited_for(place: Location, proxy: FaultProxy) -> None:
    proxy.script("slow", "slow")
    with Counted() as counted:
        assert read_bytes(place / "known") == CONTENT
    assert counted["requests"] == 2


def test_a_deletion_whose_answer_was_lost_is_done(place: Location, proxy: FaultProxy) -> None:
    lost = place / "known"
    handler = place.fs.handler
    plain = handler._client.plain

    def delete_then_lose() -> None:
        gone = plain.get_file_info(lost.path).type.name == "NotFound"
        plain.delete_file(lost.path)
        assert not gone
        raise OSError("AWS Error NETWORK_CONNECTION during DeleteObject operation: curlCode: 56, reset")

    with Counted() as counted:
        handler._once(lost.path, delete_then_lose)
    assert counted["retries_connection"] == 1
    with pytest.raises(FileNotFoundError):
        place.fs.delete_file(lost.path)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_faults_gives_the_same_bytes(place: Location, proxy: FaultProxy, seed: int) -> None:
    where = place / "shard.parquet"
    rows = write_shard(where)
    rng = random.Random(seed)
    quick = ["", "500", "503", "slow down", "429", "cut", "reset"]
    for group in rng.sample(range(4), 2):
        proxy.clear()
        proxy.script(*rng.choices(quick, k=rng.randint(1, 5)))
        assert group_of(where, group).equals(rows.slice(group * 16, 16))


# Ranges


def test_a_row_group_is_read_by_few_requests(place: Location, proxy: FaultProxy) -> None:
    where = place / "shard.parquet"
    rows = write_shard(where)
    proxy.clear()
    assert group_of(where, 1).equals(rows.slice(16, 16))
    assert proxy.methods() == {"HEAD": 1, "GET": 2}  # length, footer, both columns at once
    unchanging = where.unchanging()
    group_of(unchanging, 2)
    proxy.clear()
    assert group_of(unchanging, 3).equals(rows.slice(48, 16))
    assert proxy.methods() == {"GET": 2}


def test_a_row_group_comes_whole_through_cut_bodies(place: Location, proxy: FaultProxy) -> None:
    where = place / "shard.parquet"
    rows = write_shard(where)
    proxy.script("cut", "cut", "", "cut", "cut", method="GET")
    with Counted() as counted:
        assert group_of(where, 1).equals(rows.slice(16, 16))
    assert counted["retries_cut"] == 4
    cut = [one.range for one in proxy.seen if one.fault == "cut"]
    assert len(set(cut)) == 2
    assert all(span for span in cut)


def test_a_stream_goes_on_where_it_was_cut(place: Location, proxy: FaultProxy) -> None:
    content = np.random.default_rng(1).bytes((20 << 20) + 3)
    write_bytes(place / "long", content)
    proxy.clear()
    proxy.script("", "cut", "503", method="GET")
    with place.fs.open_input_stream((place / "long").path) as stream:
        pieces = [stream.read(5), stream.read(9 << 20), stream.read()]
    assert b"".join(pieces) == content
    starts = [int(one.range.removeprefix("bytes=").partition("-")[0]) for one in proxy.seen if one.method == "GET"]
    assert starts == [0, 8 << 20, 8 << 20, 8 << 20, 16 << 20]


def test_an_object_that_shrinks_or_goes_is_not_read_on(place: Location, proxy: FaultProxy) -> None:
    where = (place / "known").unchanging()
    with where.fs.open_input_file(where.path) as file:
        assert file.read(100) == CONTENT[:100]
    write_bytes(place / "known", b"short")
    # `place` and `where` share a client, so an overwriting by this process is known to it.
    assert read_bytes(where) == b"short"
    with where.fs.open_input_file(where.path) as file:
        place.fs.delete_file(where.path)
        with pytest.raises(FileNotFoundError):
            file.read()
    with pytest.raises(DataError, match="known is missing"):
        read_bytes(where)


# Faults that do not pass


@pytest.mark.parametrize(("fault", "tries"), [("403", 3), ("signature", 3), ("404", 1)])
def test_what_is_forbidden_or_missing_is_said_at_once(
    place: Location, proxy: FaultProxy, fault: str, tries: int
) -> None:
    proxy.always(fault)
    started = time.monotonic()
    error, text = (DataError, "known is missing") if fault == "404" else (EnvironmentFault, "forbids access to s3://")
    with pytest.raises(error, match=text):
        read_bytes(place / "known")
    assert len(proxy.seen) == tries
    assert time.monotonic() - started < 3


def test_a_bucket_that_never_let_us_in_is_asked_once(place: Location, proxy: FaultProxy) -> None:
    proxy.always("403")
    with pytest.raises(EnvironmentFault, match="forbids access to s3://never-seen/a"):
        resolve("s3://never-seen/a")
    assert len(proxy.seen) == 1


def test_a_bad_signature_is_not_asked_again(place: Location, proxy: FaultProxy) -> None:
    proxy.always("signature", method="PUT")
    with pytest.raises(EnvironmentFault, match="forbids access to"):
        write_bytes(place / "new", b"new")
    assert len(proxy.seen) == 1


@pytest.mark.parametrize("fault", ["403", "404"])
def test_a_refusal_of_a_range_is_known_for_what_it_is(place: Location, proxy: FaultProxy, fault: str) -> None:
    where = place / "known"
    with where.fs.open_input_file(where.path) as file:
        assert file.read(100) == CONTENT[:100]
        proxy.clear()
        proxy.always(fault)
        with pytest.raises(FileNotFoundError if fault == "404" else OSError) as caught:
            file.read(100)  # too short a range for pyarrow to receive the refusal's text
    assert fault == "404" or "ACCESS_DENIED" in str(caught.value)
    assert len(proxy.seen) <= 6


def test_one_denial_of_what_was_readable_is_overload(place: Location, proxy: FaultProxy) -> None:
    proxy.script("403", method="HEAD")
    with Counted() as counted:
        assert read_bytes(place / "known") == CONTENT
    assert counted["retries_denied"] == 1


@pytest.mark.parametrize(
    ("fault", "text"),
    [("500", "answers 500 for"), ("slow down", "answers 503 for"), ("reset", "cannot be reached for")],
)
def test_what_lasts_is_said_when_the_time_is_over(
    impatient: Location, proxy: FaultProxy, fault: str, text: str
) -> None:
    proxy.clear()
    proxy.always(fault)
    started = time.monotonic()
    with Counted() as counted, pytest.raises(EnvironmentFault, match=text) as caught:
        read_bytes(impatient / "known")
    assert time.monotonic() - started < 3.5
    tries = int(counted["requests"])
    assert f" after {tries} tries in " in str(caught.value)
    assert tries >= 2
    assert counted["gave_up"] == 1
    with pytest.raises(EnvironmentFault, match=r"cannot read shard .* after \d+ tr(y|ies) in \d+ s"):
        group_of(impatient / "shard.parquet", 0)


def test_a_storage_that_is_gone_is_said_within_the_time(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    location = resolve(place.uri, check=False)
    asks: list[Callable[[], object]] = [
        lambda: read_bytes(location / "known"),
        lambda: write_bytes(location / "new", b"new"),
        lambda: exists(location / "known"),
        lambda: resolve(place.uri),
    ]
    for ask in asks:
        started = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"cannot be reached for s3://.* after \d+ tr(y|ies) in"):
            ask()
        assert time.monotonic() - started < 3.5


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_that_is_none(place: Location, seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", seconds)
    with pytest.raises(SettingsError, match="FLAM_STORAGE_RETRY_SECONDS is"):
        resolve(place.uri)


# Uploads


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_part_of_an_upload_is_sent_again(place: Location, proxy: FaultProxy, fault: str) -> None:
    content = np.random.default_rng(2).bytes(3 * WHOLE_BYTES + 11)
    proxy.script("", fault, fault, method="PUT")
    with place.fs.open_output_stream((place / "large").path) as stream:
        for start in range(0, len(content), 1 << 20):
            stream.write(content[start : start + (1 << 20)])
    assert not proxy.pending
    assert read_bytes(place / "large") == content


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("way", ["whole", "stream"])
def test_an_upload_that_fails_leaves_nothing(impatient: Location, proxy: FaultProxy, method: str, way: str) -> None:
    proxy.clear()
    where, content = impatient / f"{way}-{method}", bytes(3 * WHOLE_BYTES)
    # One part arrives; then all that begins or continues the upload fails, but its end would be let through.
    if method == "PUT":
        proxy.script("", method="PUT")
    proxy.always("500", method=method)
    if way == "whole":
        with pytest.raises(EnvironmentFault, match="answers INTERNAL_FAILURE for"):
            write_bytes(where, content)
    else:
        stream = where.fs.open_output_stream(where.path)
        with pytest.raises(OSError, match="INTERNAL_FAILURE"):
            for start in range(0, len(content) + 1, 1 << 20):
                stream.write(content[start : start + (1 << 20)])
                if start + (1 << 20) >= len(content):
                    stream.close()
        proxy.clear()
        with suppress(OSError):
            stream.close()
        del stream
    proxy.clear()
    assert not exists(where)


# What others do with the file system


def test_it_pickles_and_says_its_type(place: Location) -> None:
    again = pickle.loads(pickle.dumps(place))  # noqa: S301
    assert again == place
    assert again.fs == place.fs
    assert (again.fs.type_name, again.local) == ("s3", False)
    assert read_bytes(again / "known") == CONTENT
    unchanging = pickle.loads(pickle.dumps(place.unchanging()))  # noqa: S301
    assert unchanging.fs.requests.unchanging


def _read_elsewhere(location: Location, answer: multiprocessing.SimpleQueue[str]) -> None:
    answer.put(hashlib.sha256(read_bytes(location / "known")).hexdigest())


def test_another_process_reads_through_it(place: Location) -> None:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_read_elsewhere, args=(place, answer))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answer.get() == hashlib.sha256(CONTENT).hexdigest()


def test_folders_are_copied_as_ray_copies_them(place: Location, tmp_path: Path) -> None:
    files = {f"f{i}": np.random.default_rng(i).bytes(1000 + i) for i in range(20)}
    files["large"] = bytes(WHOLE_BYTES + 1)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    copy_files(str(tmp_path), place.path, LocalFileSystem(), place.fs)
    assert {name: read_bytes(place / name) for name in files} == files
