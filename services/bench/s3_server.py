"""An S3 server on this machine for benchmarks: moto's, where it is installed (extra `dev`)."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import boto3

from flam_core.errors import EnvironmentFault

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_START = "import sys; from moto.server import main; main(sys.argv[1:])"
_SECONDS = 60.0


def installed() -> bool:
    """Whether there is a server to start."""
    return importlib.util.find_spec("moto") is not None and importlib.util.find_spec("flask") is not None


@contextmanager
def running() -> Iterator[str]:
    """`s3://bucket` of an empty bucket; the environment leads S3 clients, also of child processes, to the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", _START, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        _wait(server, port)
        boto3.client("s3").create_bucket(Bucket="bench")
        yield "s3://bench"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise EnvironmentFault(f"the S3 server for the benchmark did not start on port {port}", fix="Is moto installed?")
