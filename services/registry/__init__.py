"""Registry: model versions in MLflow, as safetensors that load with pickle forbidden."""

from services.registry.versions import download, nominate, register, trained_on

__all__ = ["download", "nominate", "register", "trained_on"]
