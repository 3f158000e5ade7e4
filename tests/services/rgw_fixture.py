"""Ceph's S3 gateway (RGW) on this host: a monitor, one OSD that keeps its objects in memory, and the gateway.

It checks signatures, owners and policies as stores in production do, which the server of the other tests does not.
Installed by `infra/rgw/install.sh`; no root is needed to run it. All files lie in one temporary folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from pyarrow.fs import FileSelector

from flam_core.worlds.grid import GridWorld
from services.storage import Location, read_bytes, resolve
from tests.conftest import S3_ENVIRONMENT
from tests.services.conftest import free_ports

GRID_WORLD = GridWorld(agents=2, frame_size=32)
INGEST = ("ingest", "--world", "grid", "--size", "32", "--episodes", "4", "--frames", "20")
"""The same, by `jobs/ingest.py`."""
PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool")

_START_SECONDS = 90.0
_SETTINGS = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
keyring = {folder}/keyring
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
crash_dir = {folder}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0

[mon.a]
mon_data = {folder}/mon
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 1
auth_allow_insecure_global_id_reclaim = true

[osd.0]
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 1073741824
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1

[client.rgw]
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw_thread_pool_size = 16
rgw_num_rados_handles = 1
rgw_rados_pool_pg_num_min = 1
rgw_enable_usage_log = false
rgw_dynamic_resharding = false
rgw_run_sync_thread = false
rgw_crypt_require_ssl = false
"""


@dataclass(frozen=True)
class User:
    """A user of the gateway and their keys."""

    name: str
    access_key: str
    secret_key: str

    @staticmethod
    def new(name: str) -> User:
        return User(name, f"{name}{uuid.uuid4().hex[:12]}".upper(), uuid.uuid4().hex)


@dataclass(frozen=True)
class Gateway:
    """A running gateway. Neither user may use what the other made, but by a bucket's policy."""

    endpoint: str
    owner: User
    stranger: User

    def environment(self, user: User, **changes: str) -> dict[str, str]:
        """The variables that point an S3 client at this gateway as `user`."""
        return {
            **S3_ENVIRONMENT,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
            **changes,
        }

    def client(self, user: User) -> Any:
        """A boto3 client, which shares no code with the file system under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=user.access_key,
            aws_secret_access_key=user.secret_key,
            region_name="us-east-1",
        )

    def make_bucket(self) -> str:
        """A new, empty bucket of the owner's."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client(self.owner).create_bucket(Bucket=name)
        return name


def missing_programs() -> list[str]:
    """What is not installed of all that a gateway needs."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def running_gateway() -> Iterator[Gateway]:
    """A gateway with its two users; ended, and its folder deleted, on the way out."""
    mon_port, rgw_port = free_ports(2)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flam-rgw-", ignore_cleanup_errors=True)))
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        (folder / "keyring").touch()
        fsid = str(uuid.uuid4())
        settings = _SETTINGS.format(fsid=fsid, folder=folder, mon_port=mon_port, rgw_port=rgw_port)
        (folder / "ceph.conf").write_text(settings)
        tell = partial(_tell, folder)
        start = partial(_start, stack, folder)

        monmap = str(folder / "monmap")
        tell("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
        tell("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        monitor = start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        _wait(monitor, folder, lambda: _answers(folder, "ceph", "--connect-timeout", "5", "osd", "new", osd, "0"))
        tell("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        disk = start("ceph-osd", "-i", "0")
        _wait(disk, folder, lambda: "1 up" in tell("ceph", "osd", "stat"))
        users = User.new("owner"), User.new("stranger")
        for user in users:
            keys = ("--access-key", user.access_key, "--secret-key", user.secret_key)
            tell(
                "radosgw-admin", "--id", "rgw", "user", "create", "--uid", user.name, "--display-name", user.name, *keys
            )
        endpoint = f"http://127.0.0.1:{rgw_port}"
        gateway = start("radosgw", "--id", "rgw")
        _wait(gateway, folder, lambda: _serves(endpoint))
        yield Gateway(endpoint, *users)


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    """A running gateway."""
    if missing := missing_programs():
        pytest.skip(f"Ceph is not installed ({', '.join(missing)}): run infra/rgw/install.sh")
    with running_gateway() as running:
        yield running


@pytest.fixture
def place(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A prefix in a new bucket of the owner's, whose keys are in the environment."""
    use(monkeypatch, gateway.environment(gateway.owner))
    return resolve(f"s3://{gateway.make_bucket()}/sets/a")


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Put `variables` into the environment, and out of it what would lead elsewhere."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def objects(place: Location) -> dict[str, bytes]:
    """Name below `place` and content of each object."""
    listed = place.fs.get_file_info(FileSelector(place.path, recursive=True, allow_not_found=True))
    names = [info.path.removeprefix(f"{place.path}/") for info in listed if info.is_file]
    return {name: read_bytes(place / name) for name in names}


def put(gateway: Gateway, place: Location, content: bytes) -> None:
    """Write an object behind flam's back."""
    bucket, _, key = place.path.partition("/")
    gateway.client(gateway.owner).put_object(Bucket=bucket, Key=key, Body=content)


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CEPH_")}
    return {**kept, "CEPH_CONF": str(folder / "ceph.conf")}


def _tell(folder: Path, *command: str) -> str:
    """What a program of Ceph's printed. Raises RuntimeError with what it complained of."""
    done = subprocess.run(
        command,
        env=_environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}{_logs(folder)}")
    return done.stdout


def _answers(folder: Path, *command: str) -> bool:
    try:
        _tell(folder, *command)
    except RuntimeError:
        return False
    return True


def _start(stack: ExitStack, folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """A server of Ceph's, ended by `stack`."""
    log = stack.enter_context((folder / f"{command[0]}.out").open("wb"))
    server = subprocess.Popen(
        [*command, "-f"],
        env=_environment(folder),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the tests only, which then end the servers in order
    )
    stack.callback(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()  # nothing in it is to be kept
        server.wait()


def _wait(server: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> None:
    """Until `ready()`. Raises RuntimeError with the ends of all logs if that takes too long or `server` ends."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if ready():
            return
        time.sleep(0.2)
    raise RuntimeError(f"{server.args} is not ready (exit {server.poll()}){_logs(folder)}")


def _serves(endpoint: str) -> bool:
    try:
        return requests.get(endpoint, timeout=5, proxies={"http": ""}).status_code == 200
    except requests.RequestException:
        return False


def _logs(folder: Path) -> str:
    files = sorted([*folder.glob("*.out"), *folder.glob("*.log")])
    return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)
