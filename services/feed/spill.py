"""How much Ray has moved from its shared memory to disk, which a feed must never cause."""

from __future__ import annotations

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

SPILLED = "feed/spilled_bytes"
"""Of a log line: what was spilled since the process began."""


def spilled_bytes() -> int:
    """Bytes that all nodes of the cluster have spilled since it started. Ray has no public call for it."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)
