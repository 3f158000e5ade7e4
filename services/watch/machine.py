"""System metrics of a node."""

from __future__ import annotations

import sys
from typing import Any

import psutil


class Machine:
    """Looks at the node that it is on. Rates are those since the last look."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer says nothing
        self._network = psutil.net_io_counters()

    def look(self) -> dict[str, float]:
        """`cpu_percent`, `memory_gb`, `memory_percent`, `disk_percent`, `network_received_gb`, `network_sent_gb`
        since the last look, and for each GPU that this process sees `gpu0_memory_gb` (used by anyone)."""
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_gb": (memory.total - memory.available) / 1e9,
            "memory_percent": memory.percent,
            "disk_percent": psutil.disk_usage("/").percent,
            "network_received_gb": (network.bytes_recv - self._network.bytes_recv) / 1e9,
            "network_sent_gb": (network.bytes_sent - self._network.bytes_sent) / 1e9,
        }
        self._network = network
        torch: Any = sys.modules.get("torch")  # who has not loaded it uses no GPU
        for device in range(torch.cuda.device_count() if torch and torch.cuda.is_initialized() else 0):
            free, total = torch.cuda.mem_get_info(device)
            found[f"gpu{device}_memory_gb"] = (total - free) / 1e9
        return found
