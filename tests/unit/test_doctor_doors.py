"""The doctor tries doors as a stranger would, asks MLflow what takes a password, and leaves busy GPUs alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

import boto3
import pytest
from pyarrow.fs import LocalFileSystem
from ray.exceptions import GetTimeoutError, RayError

from services.doctor import nodes, security
from services.doctor.finding import State, last_line
from services.doctor.node import report, write_read_delete
from services.doctor.security import _bucket_closed, _mlflow_closed
from services.storage import Location

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def closed_mlflow() -> Iterator[str]:
    """A server that is healthy, and lets nobody in."""

    class Closed(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(200 if self.path == "/health" else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Closed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_node_whose_password_mlflow_refuses_is_not_well(closed_mlflow: str, tmp_path: Path) -> None:
    found = report(str(tmp_path), str(tmp_path / "runs"), closed_mlflow)
    assert "does not take a run" in found.tracking
    assert _mlflow_closed(closed_mlflow).state == State.OK


@pytest.mark.parametrize("look", [lambda: _mlflow_closed(NOBODY), lambda: _bucket_closed("s3://flam/runs")])
def test_what_does_not_answer_is_neither_open_nor_closed(
    look: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOBODY)
    found = look()
    assert found.state == State.RED
    assert "answers at http://127.0.0.1:9" in found.seen
    assert "basic-auth" not in found.fix
    assert "public access" not in found.fix


@pytest.mark.parametrize("beyond", [False, True])
def test_an_open_bucket_is_found_and_left_as_it_was(
    s3_server: Callable[[], str], monkeypatch: pytest.MonkeyPatch, beyond: bool
) -> None:
    bucket = s3_server()
    if beyond:  # as if others could reach it
        monkeypatch.setattr(security, "is_loopback", lambda host: False)
    found = _bucket_closed(f"s3://{bucket}/runs")
    assert found.state == (State.RED if beyond else State.NOTE)
    assert "LIST 200" in found.seen  # moto hands out no object without a key, and takes each
    assert "PUT 200" in found.seen
    assert boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_what_is_tried_with_keys_leaves_nothing_in_a_bucket(s3_server: Callable[[], str]) -> None:
    bucket = s3_server()
    write_read_delete(f"s3://{bucket}/runs")
    assert boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"] == 0


class Aws:
    """AWS to a stranger: the bucket is in another region, and lets through what is in `lets`."""

    def __init__(self, folder: Path, lets: set[str]) -> None:
        self.folder, self.lets = folder, lets

    def ask(self, method: str, url: str, **_: Any) -> Any:
        there = urlparse(url)
        headers = {"x-amz-bucket-region": "eu-north-1"}
        if there.hostname != "s3.eu-north-1.amazonaws.com":
            return SimpleNamespace(status_code=301, headers=headers)
        kind = "LIST" if "list-type" in url else method
        if kind not in self.lets:
            return SimpleNamespace(status_code=403, headers=headers)
        place = Path("/", unquote(there.path).lstrip("/"))
        if kind == "PUT":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"of a stranger")
        return SimpleNamespace(status_code=200 if kind != "GET" or place.exists() else 404, headers=headers)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Aws:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    made = Aws(tmp_path, set())
    for method in ("head", "get", "put", "delete"):
        monkeypatch.setattr(security.requests, method, lambda url, m=method.upper(), **rest: made.ask(m, url, **rest))
    where = Location(LocalFileSystem(), str(tmp_path / "bucket" / "runs"), "s3://bucket/runs")
    monkeypatch.setattr(security, "resolve", lambda _: where)
    return made


@pytest.mark.parametrize(
    ("lets", "state", "said"),
    [
        (set(), State.OK, "refused (LIST 403, GET 403, PUT 403)"),
        ({"LIST"}, State.RED, "https://s3.eu-north-1.amazonaws.com answers LIST 200"),
        ({"GET"}, State.RED, "LIST 403, GET 200, PUT 403"),
        ({"PUT"}, State.RED, "LIST 403, GET 403, PUT 200"),
    ],
)
def test_a_bucket_of_another_region_is_tried_there_by_all_three_doors(
    aws: Aws, lets: set[str], state: State, said: str
) -> None:
    aws.lets = lets
    found = _bucket_closed("s3://bucket/runs")
    assert found.state == state
    assert said in found.seen
    assert [path for path in aws.folder.rglob("*") if path.is_file()] == []


def test_a_redirect_that_says_no_region_is_not_a_refusal(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("head", "get", "put", "delete"):
        answer = SimpleNamespace(status_code=301, headers={})
        monkeypatch.setattr(security.requests, method, lambda url, answer=answer, **_: answer)
    assert _bucket_closed("s3://bucket/runs").state == State.RED


class Cluster:
    """A Ray of one node with GPUs: `answers` are what it gives, in turn; an error is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []

    def remote(self, **wanted: Any) -> Callable[[Any], Any]:
        self.asked.append(wanted)

        def call(*_: Any) -> None: ...

        made = SimpleNamespace(address=SimpleNamespace(remote=call), add=SimpleNamespace(remote=call))
        return lambda _: SimpleNamespace(remote=lambda: made)

    def get(self, *_: Any, **__: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    def of(*answers: Any) -> Cluster:
        made = Cluster(*answers)
        node = {"Alive": True, "NodeID": "0" * 56, "NodeManagerAddress": "10.0.0.7", "Resources": {"GPU": 4.0}}
        ray = SimpleNamespace(
            nodes=lambda: [node], cluster_resources=lambda: {"GPU": 4.0}, get=made.get, kill=lambda _: None
        )
        monkeypatch.setattr(nodes, "ray", ray)
        monkeypatch.setattr(nodes, "_remote", made.remote)
        monkeypatch.setattr(nodes, "NodeAffinitySchedulingStrategy", lambda *_, **__: "there")
        return made

    return of


def test_all_gpus_of_a_node_are_looked_at(gpus: Callable[..., Cluster]) -> None:
    made = gpus(["H200, CUDA 13.0"] * 4)
    assert nodes.examine_gpus(True).seen == "4 of H200, CUDA 13.0"
    assert made.asked[0]["num_gpus"] == 4
    gpus(["H200, CUDA 13.0"] * 3)
    short = nodes.examine_gpus(True)
    assert (short.state, "PyTorch sees 3" in short.seen) == (State.RED, True)


def test_busy_gpus_are_a_note(gpus: Callable[..., Cluster]) -> None:
    gpus(GetTimeoutError())
    assert nodes.examine_gpus(True).state == State.NOTE
    gpus(GetTimeoutError())
    busy = nodes.examine_collective()
    assert (busy.state, busy.check) == (State.NOTE, "all-reduce (nccl)")
    assert "in use" in busy.seen


def test_ranks_that_do_not_find_one_another_are_red(gpus: Callable[..., Cluster]) -> None:
    gpus(["tcp://10.0.0.7:1"] * 4, GetTimeoutError())
    assert nodes.examine_collective().state == State.RED
    gpus(["tcp://10.0.0.7:1"] * 4, [(10.0, 900.0)] * 4)
    assert nodes.examine_collective().seen == "4 ranks, 900 MB/s"


def test_an_error_without_words_is_named_by_its_kind(gpus: Callable[..., Cluster]) -> None:
    assert last_line(RayError("\n  why \n\n")) == "why"
    gpus(RayError(""))
    assert "RayError" in nodes.examine_gpus(True).seen
    gpus(RayError(""))
    assert nodes.examine_collective().seen == "RayError"
