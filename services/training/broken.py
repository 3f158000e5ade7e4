"""Clips that turn out to be broken while they are read: counted, named in the run's folder, and left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from flam_core.data.quarantine import BadClip, Quarantine
from flam_core.errors import DataError
from services.feed import FeedPlan, FeedSource
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
    found = _listed(run, "quarantine.json", *(f"quarantine-rank-{rank}.json" for rank in range(workers)))
    return _write(run, found)


def add_broken(run: Location, source: FeedSource, clips: Sequence[BadClip], max_share: float) -> None:
    """Add what evaluation found to the run's `quarantine.json`.

    Raises DataError with the list if the data set now has more broken clips than the share allowed.
    """
    found = _listed(run, "quarantine.json")
    for clip in clips:
        entry = {"data": source.data.uri, **asdict(clip)}
        if found.setdefault(_key(entry), entry) is entry:
            print(f"left out of evaluation: {source.data.uri}/{clip}", flush=True)
    _write(run, found)
    known = Quarantine(clips=(*source.quarantine.clips, *clips))
    known.check(source.manifest, max_share)


def _listed(run: Location, *names: str) -> dict[str, dict[str, object]]:
    places = [run / name for name in names]
    return {_key(entry): entry for place in places if exists(place) for entry in json.loads(read_bytes(place))}


def _write(run: Location, found: dict[str, dict[str, object]]) -> int:
    if found:
        entries = [found[key] for key in sorted(found)]
        write_bytes(run / "quarantine.json", (json.dumps(entries, indent=1) + "\n").encode())
    return len(found)


def _key(entry: dict[str, object]) -> str:
    return f"{entry['data']} {entry['shard']} {entry['row']}"
