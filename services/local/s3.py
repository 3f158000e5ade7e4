"""An S3 server for one machine: moto's, where it is installed (extra `dev`). It keeps objects in memory and believes
whoever asks, so it listens on 127.0.0.1 alone."""

from __future__ import annotations

import importlib.util
import sys

_START = "import sys; from moto.server import main; main(sys.argv[1:])"


def installed() -> bool:
    """Whether there is a server to start."""
    return importlib.util.find_spec("moto") is not None and importlib.util.find_spec("flask") is not None


def s3_command(port: int) -> list[str]:
    """That starts it."""
    return [sys.executable, "-c", _START, "-H", "127.0.0.1", "-p", str(port)]
