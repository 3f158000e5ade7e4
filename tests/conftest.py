"""Fixtures for all tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

# Shared machines stall: how long an example took says nothing about the code.
settings.register_profile("flam", deadline=None)
settings.load_profile("flam")
# On a machine that is shared, threads that wait for one another cost more than they give to models this small.
torch.set_num_threads(1)

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    # Stores other than AWS refuse the checksums that newer clients send unasked.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Callable[[], str]]:
    """A moto server in a process of its own; the environment points every S3 client of the test run at it.

    Gives a function that makes a new, empty bucket and returns its name.
    """
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    start = "import sys; from moto.server import main; main(sys.argv[1:])"
    server = subprocess.Popen(
        [sys.executable, "-c", start, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in S3_ENVIRONMENT.items():
                patch.setenv(name, value)
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
                patch.delenv(name, raising=False)
            _wait(server, port)
            client = boto3.client("s3")

            def make_bucket() -> str:
                name = f"test-{uuid.uuid4().hex[:12]}"
                client.create_bucket(Bucket=name)
                return name

            yield make_bucket
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, seconds: float = 60.0) -> None:
    """Until the server takes connections."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"moto server (pid {server.pid}) ended with {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"moto server did not answer on port {port} in {seconds:.0f} s")
