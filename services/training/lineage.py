"""Where a model comes from: code, hardware, and what it took."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import torch

from services.storage import Location, exists, read_bytes

_CPUINFO = Path("/proc/cpuinfo")


def git_commit() -> str:
    """The commit of the code, or "unknown" outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def hardware(device: torch.device) -> str:
    """The accelerator, or the processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def seconds_used(run: Location) -> tuple[float, float]:
    """Wall time of a run so far, over all its attempts, and that times its workers: GPU-seconds, where they have one
    each. Zeros if it kept no ledger."""
    place = run / "goodput.json"
    if not exists(place):
        return 0.0, 0.0
    attempts = json.loads(read_bytes(place))["attempts"]
    walls = [sum(attempt["seconds"].values()) for attempt in attempts]
    workers = [max(attempt.get("workers") or [1]) for attempt in attempts]
    return sum(walls), sum(wall * count for wall, count in zip(walls, workers, strict=True))
