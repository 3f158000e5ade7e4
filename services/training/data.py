"""The data of a run: one data set or several with weights, checked before anything starts."""

from __future__ import annotations

import hashlib

import numpy as np

from flam_core.config import Config
from flam_core.config_json import canonical_json
from flam_core.data.manifest import read_manifest
from flam_core.data.quarantine import read_quarantine
from flam_core.data.shard import TRUTH_COLUMNS, decode_truth, read_row_group, verify_shard
from flam_core.errors import DataError, SettingsError
from services.feed import FeedSource, StagePlan
from services.storage import resolve


def parse_data(text: str) -> list[tuple[str, float]]:
    """Addresses and weights of `--data`: `place`, or `place@2,other@1`. Raises SettingsError if it is not that."""
    found: list[tuple[str, float]] = []
    for part in text.split(","):
        place, at, weight = part.strip().rpartition("@")
        if not at:
            place, weight = weight, "1"
        try:
            found.append((place, float(weight)))
        except ValueError as error:
            raise SettingsError(
                f"--data {part}: {weight!r} is not a weight", fix="Write it as data/a or data/a@2,data/b@1."
            ) from error
        if not place:
            raise SettingsError(f"--data {text} names no place", fix="Write it as data/a or data/a@2,data/b@1.")
    return found


def open_sources(parts: list[tuple[str, float]], *, max_bad_share: float) -> tuple[FeedSource, ...]:
    """Read manifest and quarantine of each data set.

    Raises DataError if there is none, or if more than `max_bad_share` of the clips are quarantined; EnvironmentFault if
    the storage does not answer.
    """
    sources = []
    for address, weight in parts:
        data = resolve(address)
        manifest = read_manifest(data.fs, data.path)
        quarantine = read_quarantine(data.fs, data.path)
        quarantine.check(manifest, max_bad_share)
        sources.append(FeedSource(data, manifest, quarantine, weight))
    names = [source.manifest.name for source in sources]
    if len(set(names)) < len(names):
        raise DataError(f"two data sets are called {' and '.join(names)}", fix="Ingest one with another --name.")
    return tuple(sources)


def stage_plans(config: Config) -> tuple[StagePlan, ...]:
    """What the feed is to know of both stages."""
    return tuple(
        StagePlan(stage.steps, stage.batch_clips, stage.clip_frames, stage.frame_skip, stage.window_stride)
        for stage in (config.tokenizer_stage, config.flam_stage)
    )


def verify_sources(sources: tuple[FeedSource, ...]) -> None:
    """Read every shard and compare its sha256. Raises DataError, naming the shard, if one is not what it was."""
    for source in sources:
        known = {clip.shard for clip in source.quarantine.clips}  # that these differ is known, and dealt with
        for shard in source.manifest.shards:
            if shard.name not in known:
                verify_shard(source.data.fs, source.data.path, shard)


def check_frame_size(sources: tuple[FeedSource, ...], config: Config) -> None:
    """Raises SettingsError if frames are not of the size that the tokenizer takes."""
    for source in sources:
        height, width = source.manifest.frame_size
        if (height, width) != (config.tokenizer.frame_size,) * 2:
            raise SettingsError(
                f"data set {source.data} has frames of {height}x{width}, tokenizer.frame_size is "
                f"{config.tokenizer.frame_size}",
                fix=f"Set --tokenizer.frame_size {height}, or ingest with --size {config.tokenizer.frame_size}.",
            )


def data_sha256(sources: tuple[FeedSource, ...]) -> str:
    """Identity of the data of a run: the manifest's, for one data set without quarantined clips."""
    if len(sources) == 1 and not sources[0].quarantine.clips:
        return sources[0].manifest.sha256
    return hashlib.sha256(canonical_json([source.identity for source in sources]).encode()).hexdigest()


def has_positions(sources: tuple[FeedSource, ...]) -> bool:
    """Whether the first data set knows where its entities are, by its first clip."""
    source = sources[0]
    shard = source.manifest.split("train")[0]
    row = read_row_group(source.data.fs, f"{source.data.path}/{shard.name}", 0, TRUTH_COLUMNS).to_pylist()[0]
    truth = decode_truth(row)
    return truth is not None and truth.positions is not None


def describe_actions(sources: tuple[FeedSource, ...]) -> tuple[int, int, int] | None:
    """Entities, numbers of an action and kinds of a discrete action (0: values) of the first data set's true actions.

    None if its first clip has none. By the first shard: whole numbers from 0 on are taken for kinds.
    """
    source = sources[0]
    shard = source.manifest.split("train")[0]
    kinds = 0
    shape: tuple[int, int] | None = None
    for group in range(len(shard.row_groups)):
        for row in read_row_group(source.data.fs, f"{source.data.path}/{shard.name}", group, TRUTH_COLUMNS).to_pylist():
            truth = decode_truth(row)
            if truth is None or truth.actions is None:
                return None
            shape = shape or (truth.actions.shape[1], truth.actions.shape[2])
            known = truth.actions[np.isfinite(truth.actions)]
            if not len(known) or known.min() < 0 or (known != known.round()).any():
                return (*shape, 0)
            kinds = max(kinds, int(known.max()) + 1)
    return None if shape is None else (*shape, kinds)
