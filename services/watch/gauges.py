"""Numbers of a run as metrics of Ray, which its dashboard and Prometheus show (docs/operations.md: alerts)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray.util.metrics import Gauge

from flam_core.learning.collapse import FindingName

HEALTH = (
    "tokenizer/psnr",
    "tokenizer/codes_used",
    "flam/explained",
    "flam/kl",
    "flam/active_units",
    "flam/codebook_perplexity",
    "flam/codes_used",
    "flam/largest_mask_share",
)
"""Meters of a log line that tell whether codes, latent actions and slots are in use (docs/learning.md)."""
SPEED = ("speed/frames_per_second", "speed/mfu")
"""Of a log line."""
COLLAPSE = "collapse"
"""1 while a finding of that name holds (tag `finding`), else 0."""
GOODPUT = "goodput_seconds"
"""Of the run's time, all attempts, by where it went (tag `bucket`)."""


class Gauges:
    """Shown for as long as the process lives, some half a minute after each `set`."""

    def __init__(self, run: str, rank: int | None = None) -> None:
        """rank: None for the driver, which speaks for no worker."""
        self._tags = {"flam_run": run} | ({} if rank is None else {"rank": str(rank)})
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float], **tags: str) -> None:
        """Show `values`: `feed/queue_depth` becomes `flam_feed_queue_depth`, `flam/kl` becomes `flam_kl`."""
        tags = self._tags | tags
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(exported(name), f"flam: {name} (docs/metrics.md)", tag_keys=tuple(tags))
            self._gauges[name].set(value, tags=tags)

    def set_findings(self, holding: Iterable[FindingName]) -> None:
        """Show which collapses hold, and that the others do not."""
        held = set(holding)
        for name in FindingName:
            self.set({COLLAPSE: float(name in held)}, finding=name.value)

    def set_goodput(self, seconds: Mapping[str, float]) -> None:
        """Show where the time went, by bucket."""
        for bucket, value in seconds.items():
            self.set({GOODPUT: value}, bucket=bucket)


def exported(name: str) -> str:
    """A metric's name for Ray, which puts `ray_` before it for Prometheus."""
    return f"flam_{name.removeprefix('flam/').replace('/', '_')}"
