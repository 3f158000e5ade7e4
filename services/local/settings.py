"""What a local cluster is told."""

from __future__ import annotations

from dataclasses import dataclass

from flam_core.errors import SettingsError


@dataclass(frozen=True)
class LocalSettings:
    """A cluster on this machine. Ports: 0 takes any free one."""

    folder: str = ".cluster"
    """Secrets, logs, MLflow's database and artifacts, and what runs by which pid. Kept when the cluster stops."""
    cpus: int = 0
    """Logical CPUs of the Ray head; 0: as many as the machine has, 4 at least."""
    object_store_mb: int = 512
    """Of the Ray head."""
    ray_port: int = 6379
    dashboard_port: int = 8265
    mlflow_port: int = 5000
    s3_port: int = 9000
    prometheus_port: int = 9090
    pushgateway_port: int = 9091
    metrics: bool = False
    """Start Prometheus and its Pushgateway as well: it needs the programs `prometheus` and `prometheus-pushgateway`
    (Debian's packages of these names)."""

    def __post_init__(self) -> None:
        for name, port in self.ports().items():
            if not 0 <= port < 65536:
                raise SettingsError(f"{name} = {port}", fix="Choose 1 to 65535, or 0 for any that is free.")
        taken = [port for port in self.ports().values() if port]
        if len(set(taken)) < len(taken):
            raise SettingsError("two parts have the same port", fix="Give each its own, or 0 for any that is free.")
        if self.cpus < 0:
            raise SettingsError(f"cpus = {self.cpus}", fix="Use 1 or more, or 0 for all.")
        if self.object_store_mb < 80:
            raise SettingsError(f"object_store_mb = {self.object_store_mb}", fix="Ray takes no less than 80.")

    def ports(self) -> dict[str, int]:
        """By the name of the setting."""
        names = ["ray_port", "dashboard_port", "mlflow_port", "s3_port"]
        if self.metrics:
            names += ["prometheus_port", "pushgateway_port"]
        return {name: getattr(self, name) for name in names}
