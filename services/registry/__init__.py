"""Registry: model versions in MLflow, as safetensors that load with pickle forbidden."""

from services.registry.versions import download, register

__all__ = ["download", "register"]
