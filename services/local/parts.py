"""What a local cluster consists of: how each part is started, and how one sees that it is there."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flam_core.errors import EnvironmentFault
from services.local.s3 import installed, s3_command
from services.local.secrets import Secrets, token_file
from services.local.settings import LocalSettings

HOST = "127.0.0.1"
NODE = "127.0.0.2"
"""Of the Ray node: Ray would replace 127.0.0.1 by an address that others can reach."""
BUCKET = "flam"
_INHERITED = ("RAY_", "MLFLOW_", "AWS_", "FLAM_")
_LEAST_CPUS = 4
_RAY_PORTS = (
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "object-manager-port",
    "node-manager-port",
)


@dataclass(frozen=True)
class Part:
    """A program to start."""

    name: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    """It runs there."""
    url: str
    """Where people find it."""
    health: str
    """Answers 200 when it is ready."""
    headers: Mapping[str, str]
    """That `health` asks for."""


@dataclass(frozen=True)
class Layout:
    """Everything that is decided before anything starts."""

    home: Path
    """What relative paths in jobs mean."""
    folder: Path
    ports: Mapping[str, int]
    secrets: Secrets
    ray_files: Path
    """Ray's sockets and logs; short, since a socket's path may have 107 characters."""

    def url(self, port: str) -> str:
        """Of what listens at a port, by the name of its setting."""
        return f"http://{HOST}:{self.ports[port]}"

    @property
    def for_users(self) -> dict[str, str]:
        """The environment that opens all parts; jobs of the cluster have the same."""
        monitored = {"FLAM_PUSHGATEWAY": self.url("pushgateway_port")} if "pushgateway_port" in self.ports else {}
        return {
            **monitored,
            "FLAM_HOME": str(self.home),
            "RAY_ADDRESS": f"{NODE}:{self.ports['ray_port']}",
            "RAY_API_SERVER_ADDRESS": self.url("dashboard_port"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file(self.folder)),
            "MLFLOW_TRACKING_URI": self.url("mlflow_port"),
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.secrets.mlflow_password,
            "AWS_ENDPOINT_URL": self.url("s3_port"),
            "MLFLOW_S3_ENDPOINT_URL": self.url("s3_port"),
            "AWS_ACCESS_KEY_ID": self.secrets.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.secrets.s3_secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }


def parts_of(settings: LocalSettings, layout: Layout) -> list[Part]:
    """All parts. Raises EnvironmentFault for a program that is not installed."""
    parts = [_s3(layout), _mlflow(layout), _ray(settings, layout)]
    if settings.metrics:
        parts += [_pushgateway(layout), _prometheus(layout)]
    return parts


def _s3(layout: Layout) -> Part:
    if not installed():
        raise EnvironmentFault("the S3 server moto is not installed", fix="pip install -c constraints.txt -e '.[dev]'")
    url = layout.url("s3_port")
    return Part("s3", s3_command(layout.ports["s3_port"]), _environment(), layout.folder, url, f"{url}/moto-api/", {})


def _mlflow(layout: Layout) -> Part:
    folder = layout.folder / "mlflow"
    options = {
        "host": HOST,
        "port": layout.ports["mlflow_port"],
        "workers": 1,
        "backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        # On the disk, not in the bucket: that one is empty after a stop, and a registered model must not be.
        "artifacts-destination": folder / "artifacts",
        "app-name": "basic-auth",
    }
    environment = _environment(
        MLFLOW_AUTH_ADMIN_PASSWORD=layout.secrets.mlflow_password,
        MLFLOW_FLASK_SERVER_SECRET_KEY=layout.secrets.mlflow_session_key,
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )
    url = layout.url("mlflow_port")
    return Part(
        "mlflow",
        [sys.executable, "-m", "mlflow", "server", *_flags(options)],
        environment,
        folder,
        url,
        f"{url}/health",
        {},
    )


def _ray(settings: LocalSettings, layout: Layout) -> Part:
    options = {
        "node-ip-address": NODE,
        "port": layout.ports["ray_port"],
        "dashboard-host": HOST,
        "dashboard-port": layout.ports["dashboard_port"],
        "num-cpus": settings.cpus or max(os.cpu_count() or 1, _LEAST_CPUS),
        "object-store-memory": settings.object_store_mb << 20,
        "temp-dir": layout.ray_files,
        **dict(zip(_RAY_PORTS, free_ports(len(_RAY_PORTS)), strict=True)),
    }
    monitored = {"RAY_PROMETHEUS_HOST": layout.url("prometheus_port")} if settings.metrics else {}
    ray = Path(sys.executable).with_name("ray")
    url = layout.url("dashboard_port")
    token = {"Authorization": f"Bearer {layout.secrets.ray_token}"}
    return Part(
        "ray",
        [str(ray), "start", "--head", "--block", *_flags(options)],
        _environment(**layout.for_users, RAY_TRAIN_ENABLE_PRINT_PATCH="0", **monitored),
        layout.folder,
        url,
        f"{url}/api/version",
        token,
    )


def _pushgateway(layout: Layout) -> Part:
    program = _program("prometheus-pushgateway")
    folder = layout.folder / "pushgateway"
    folder.mkdir(exist_ok=True)
    options = {
        "persistence.file": folder / "metrics",
        "web.listen-address": f"{HOST}:{layout.ports['pushgateway_port']}",
    }
    url = layout.url("pushgateway_port")
    return Part("pushgateway", [program, *_flags(options)], _environment(), folder, url, f"{url}/-/ready", {})


def _prometheus(layout: Layout) -> Part:
    program = _program("prometheus")
    folder = layout.folder / "prometheus"
    folder.mkdir(exist_ok=True)
    (folder / "prometheus.yml").write_text(
        _SCRAPE.format(
            alerts=_ALERTS,
            targets=layout.ray_files / "prom_metrics_service_discovery.json",
            pushgateway=f"{HOST}:{layout.ports['pushgateway_port']}",
        )
    )
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"{HOST}:{layout.ports['prometheus_port']}",
    }
    url = layout.url("prometheus_port")
    return Part("prometheus", [program, *_flags(options)], _environment(), folder, url, f"{url}/-/ready", {})


_ALERTS = Path(__file__).resolve().parents[2] / "infra" / "monitoring" / "alerts.yml"
_SCRAPE = """\
global: {{scrape_interval: 10s}}
rule_files: ["{alerts}"]
scrape_configs:
  - job_name: ray
    file_sd_configs: [{{files: ["{targets}"], refresh_interval: 10s}}] # Ray writes it after Prometheus has looked
  - job_name: pushgateway
    honor_labels: true
    static_configs: [{{targets: ["{pushgateway}"]}}]
"""


def _program(name: str) -> str:
    """Where it is. Raises EnvironmentFault if it is not installed."""
    if (found := shutil.which(name)) is None:
        raise EnvironmentFault(
            f"--metrics: there is no program `{name}`", fix=f"apt-get install {name}, or leave --metrics out."
        )
    return found


def _flags(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _environment(**variables: str) -> dict[str, str]:
    """This one's, without what would lead a part to another cluster; `python` is this Python, also in jobs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **variables,
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def settled_ports(settings: LocalSettings) -> dict[str, int]:
    """The port of each part. Raises EnvironmentFault if one is taken."""
    ports = settings.ports()
    for name, port in ports.items():
        if port and _taken(port):
            raise EnvironmentFault(
                f"port {port} ({name}) is taken by another program",
                fix=f"Stop that, or give --{name} another (0: any that is free).",
            )
    free = iter(free_ports(len(ports)))
    return {name: port or next(free) for name, port in ports.items()}


def _taken(port: int) -> bool:
    for host in (HOST, NODE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
            try:
                probe.bind((host, port))
            except OSError:
                return True
    return False
