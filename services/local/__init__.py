"""A cluster on one machine: Ray head, MLflow server and S3 server, each asking who is there, started and stopped."""

from services.local.cluster import Running, bring_up, running, take_down
from services.local.settings import LocalSettings

__all__ = ["LocalSettings", "Running", "bring_up", "running", "take_down"]
