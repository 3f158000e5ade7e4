"""What the feed does, in numbers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass
class FeedMeters:
    """Sums since they were last taken, of one rank."""

    decoded_clips: int = 0
    decoded_frames: int = 0
    decode_seconds: float = 0.0
    """Summed over the threads that decode; what tasks decode is part of `task_seconds`."""
    broken_clips: int = 0
    batches: int = 0
    depth: int = 0
    """Batches that lay ready when one was asked for, summed."""
    wait_seconds: float = 0.0
    """In which the trainer waited for a batch."""
    reading: Counter[str] = field(default_factory=Counter)
    """Counters of storage, and `task_seconds`, summed over the read tasks of this rank."""

    def read(self, counters: str) -> None:
        """Add what a read task says of itself (JSON)."""
        self.reading.update(json.loads(counters))

    def take(self, seconds: float) -> dict[str, float]:
        """The metrics of the last `seconds`, named as in docs/metrics.md; counting starts anew."""
        batches = max(1, self.batches)
        found = {
            "speed/data_wait_share": self.wait_seconds / seconds,
            "feed/queue_depth": self.depth / batches,
            "feed/decode_frames_per_second": self.decoded_frames / self.decode_seconds if self.decode_seconds else 0.0,
            "feed/decoded_frames": float(self.decoded_frames),
            "feed/broken_clips": float(self.broken_clips),
            "feed/read_frames_per_second": self.reading["frames"] / (self.reading["task_seconds"] or 1.0),
            "feed/bytes_read": float(self.reading["group_bytes"]),
            "feed/bytes_per_second": self.reading["group_bytes"] / seconds,
            "feed/bytes_from_bucket": float(self.reading["bytes_read"]),
            "feed/requests": float(self.reading["requests"]),
            "feed/retries": float(sum(n for name, n in self.reading.items() if name.startswith("retries_"))),
            "feed/cache_hits": float(self.reading["cache_hits"]),
            "feed/task_seconds": float(self.reading["task_seconds"]),
        }
        fresh = FeedMeters()
        for part in fields(self):
            setattr(self, part.name, getattr(fresh, part.name))
        return found
