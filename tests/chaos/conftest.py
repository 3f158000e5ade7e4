"""The same real parts as the service tests have."""

from tests.services.conftest import cluster, grid_data, mlflow_server, ray_head, unbroken_run

__all__ = ["cluster", "grid_data", "mlflow_server", "ray_head", "unbroken_run"]
