"""Generation: clips from files and data sets in, films out (`jobs/generate.py`)."""

from services.steering.generate import generate
from services.steering.settings import GenerateSettings

__all__ = ["GenerateSettings", "generate"]
