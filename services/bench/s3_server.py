"""An S3 server on this machine while a benchmark runs."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import boto3

from flam_core.errors import EnvironmentFault
from services.local.s3 import s3_command

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SECONDS = 60.0


@contextmanager
def running() -> Iterator[str]:
    """`s3://bucket` of an empty bucket; the environment leads S3 clients, also of child processes, to the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(s3_command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
