"""Watching a run while it trains: heartbeats, stalls, who runs it, and where its time goes."""

from services.watch.beats import BUCKETS, Beat, Bucket, Orders, Stage
from services.watch.control import start_control
from services.watch.goodput import Goodput
from services.watch.heart import Heart
from services.watch.lease import Lease, held
from services.watch.spans import Spans, merged
from services.watch.stall import Stall, find_stall
from services.watch.watch import Watch

__all__ = [
    "BUCKETS",
    "Beat",
    "Bucket",
    "Goodput",
    "Heart",
    "Lease",
    "Orders",
    "Spans",
    "Stage",
    "Stall",
    "Watch",
    "find_stall",
    "held",
    "merged",
    "start_control",
]
