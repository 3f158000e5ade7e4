"""A local cluster's folder of sockets is its owner's alone, and what is stopped is what was started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from flam_core.errors import EnvironmentFault
from services.local.cluster import _start, running, take_down
from services.local.parts import Part
from services.local.sockets import ray_folder

# What Ray puts below its folder; a socket's path may have 107 bytes.
LONGEST = "session_2026-11-29_22-28-52_123456_1234567/sockets/plasma_store.8"


def test_the_folder_of_sockets_is_this_users_alone(tmp_path: Path) -> None:
    found = ray_folder(Path("/home/somebody/.cluster"), tmp_path)
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert ray_folder(Path("/home/somebody/.cluster"), tmp_path) == found
    assert ray_folder(Path("/home/somebody/else"), tmp_path) != found
    assert len(str(ray_folder(Path("/home/somebody/.cluster")) / LONGEST).encode()) <= 107


@pytest.mark.parametrize("kind", ["open", "link", "file", "another's"])
def test_a_folder_that_is_anothers_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / f"flam-{os.geteuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        place.touch(0o600)
    else:
        place.mkdir(mode=0o700)
    if kind == "open":
        place.chmod(0o770)
    if kind == "another's":
        place = place.rename(tmp_path / f"flam-{os.geteuid() + 1}")
        monkeypatch.setattr(os, "geteuid", lambda me=os.geteuid(): me + 1)
    with pytest.raises(EnvironmentFault, match="not a folder of this user's alone"):
        ray_folder(Path("/home/somebody"), tmp_path)


LISTEN = """
import socket, subprocess, sys
if len(sys.argv) == 2:
    child = subprocess.Popen([sys.executable, __file__, sys.argv[1], "child"])
    child.wait()
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", int(sys.argv[1])))
server.listen()
while True:
    server.accept()
"""


def test_children_of_a_part_that_died_are_ended_and_nobody_else(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = tmp_path / "listen.py"
    program.write_text(LISTEN)
    command = [sys.executable, str(program), str(port)]
    one = _start(Part("s3", command, dict(os.environ), tmp_path, "", "", {}), tmp_path / "log")
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / "state.json").write_text(json.dumps([asdict(one)]))
    assert running(tmp_path) == [one]
    try:
        deadline = time.monotonic() + 30
        while not _answers(port):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        parent = psutil.Process(one.pid)
        (child,) = parent.children()
        parent.kill()
        parent.wait(10)
        assert child.is_running()
        assert one.rest() == [child]
        said: list[str] = []
        take_down(tmp_path, said.append)
        assert said == ["s3 had ended already; 1 that it had started have ended now"]
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert not _answers(port)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_session_that_only_has_the_number_is_left_alone(tmp_path: Path) -> None:
    """The part is long gone, and another program's session has its number by now."""
    shell = ["bash", "-c", "sleep 60 & echo $!; wait"]
    other = subprocess.Popen(shell, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        child = psutil.Process(int(other.stdout.readline()))
        gone = _start(Part("s3", ["true"], dict(os.environ), tmp_path, "", "", {}), tmp_path / "log")
        as_it = type(gone)(**{**asdict(gone), "pid": other.pid, "created": gone.created - 3600})
        assert as_it.rest() == []
        (tmp_path / "state.json").write_text(json.dumps([asdict(as_it)]))
        take_down(tmp_path, lambda _: None)
        assert child.is_running()
    finally:
        for one in psutil.Process(other.pid).children():
            one.kill()
        other.kill()
        other.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
