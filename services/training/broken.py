"""Clips that turn out to be broken while they are read: counted, named in the run's folder, and left out."""

from __future__ import annotations

import json
from dataclasses import asdict

from flam_core.data.quarantine import BadClip
from flam_core.errors import DataError
from services.feed import FeedPlan
from services.storage import Location, exists, read_bytes, write_bytes

_SHOWN = 20


class BrokenClips:
    """What one rank found. Batches lack the windows of such a clip whenever they come up, in every attempt alike."""

    def __init__(self, run: Location, plan: FeedPlan, rank: int, max_share: float) -> None:
        self._place = run / f"quarantine-rank-{rank}.json"
        self._sources, self._max_share = plan.sources, max_share
        self._clips = sum(source.manifest.clips for source in plan.sources)
        self._found: dict[tuple[str, str, int | None], dict[str, object]] = {}
        if exists(self._place):
            for entry in json.loads(read_bytes(self._place)):
                self._found[entry["data"], entry["shard"], entry["row"]] = entry

    def __call__(self, source: int, clip: BadClip) -> None:
        """Note a clip. Raises DataError with the list once there are more than the share allowed."""
        data = self._sources[source].data.uri
        key = data, clip.shard, clip.row
        if key in self._found:
            return
        self._found[key] = {"data": data, **asdict(clip)}
        print(f"left out: {data}/{clip.shard}, row {clip.row}: {clip.reason}", flush=True)
        write_bytes(self._place, (json.dumps(list(self._found.values()), indent=1) + "\n").encode())
        if len(self._found) > self._max_share * self._clips:
            reasons = [str(entry["reason"]) for entry in self._found.values()][:_SHOWN]
            raise DataError(
                f"{len(self._found)} of {self._clips} clips are broken, more than the share of {self._max_share:g} "
                f"that may be: {'; '.join(reasons)}",
                fix="Restore the data, or leave the clips out with jobs/ingest.py --verify and a higher "
                "--max_bad_share.",
            )


def merge_broken(run: Location, workers: int) -> int:
    """Gather what the ranks found in the run's `quarantine.json`; how many clips it names."""
    found: dict[str, dict[str, object]] = {}
    for place in (run / "quarantine.json", *(run / f"quarantine-rank-{rank}.json" for rank in range(workers))):
        if exists(place):
            for entry in json.loads(read_bytes(place)):
                found[f"{entry['data']} {entry['shard']} {entry['row']}"] = entry
    if found:
        entries = [found[key] for key in sorted(found)]
        write_bytes(run / "quarantine.json", (json.dumps(entries, indent=1) + "\n").encode())
    return len(found)
