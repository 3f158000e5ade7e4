"""Committed checkpoints in a run's folder or bucket.

A checkpoint is a folder `checkpoints/step-<8 digits>/` with `model.safetensors`, `optimizer.pt`, `meta.json` and,
written last, `COMMIT`, which holds the sha256 of each file. Without a COMMIT that fits, a folder is no checkpoint.
`checkpoints/index.json` names the committed ones, so that nothing has to list a bucket.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flam_core.config import Config
from flam_core.config_json import canonical_json, differing_fields, from_dict, to_dict
from flam_core.errors import DataError, FlamError, SettingsError, pack, unpack
from services.storage import Location, exists, read_bytes, write_bytes

_KEEP = 2
_FILES = ("model.safetensors", "optimizer.pt", "meta.json")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a committed checkpoint."""

    step: int
    model: bytes
    optimizer: bytes
    meta: dict[str, Any]


def save(run: Location, step: int, model: bytes, optimizer: bytes, meta: dict[str, Any]) -> None:
    """Write and commit a checkpoint, then forget all but the newest two."""
    folder = run / "checkpoints" / _name(step)
    contents = dict(zip(_FILES, (model, optimizer, canonical_json(meta).encode()), strict=True))
    for name, content in contents.items():
        write_bytes(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    write_bytes(folder / "COMMIT", canonical_json(digests).encode())
    steps = sorted({*_committed(run), step})
    index = run / "checkpoints" / "index.json"
    write_bytes(index, canonical_json(steps).encode())
    if outdated := steps[:-_KEEP]:
        for old in outdated:
            with suppress(FileNotFoundError):  # deleted by a save that was killed before it could say so
                run.fs.delete_dir((run / "checkpoints" / _name(old)).path)
        # Only now are they forgotten: a kill before this leaves them named, and the next save deletes them.
        write_bytes(index, canonical_json(steps[-_KEEP:]).encode())


def newest(run: Location) -> Checkpoint | None:
    """The newest committed checkpoint that is whole; None if there is none.

    A damaged one is passed over with a word on the console, since the one before it is still good.
    """
    for step in reversed(_committed(run)):
        folder = run / "checkpoints" / _name(step)
        try:
            digests = json.loads(read_bytes(folder / "COMMIT"))
            contents = {name: read_bytes(folder / name) for name in _FILES}
        except (DataError, ValueError) as error:
            print(f"checkpoint {folder} is not whole and is passed over: {error}", flush=True)
            continue
        broken = [name for name in _FILES if hashlib.sha256(contents[name]).hexdigest() != digests.get(name)]
        if broken:
            print(f"checkpoint {folder} is damaged ({', '.join(broken)}) and is passed over", flush=True)
            continue
        return Checkpoint(step, contents[_FILES[0]], contents[_FILES[1]], json.loads(contents[_FILES[2]]))
    return None


def newest_step(run: Location) -> int:
    """The step that `newest` resumes from; 0 if there is none. The feed must start where the trainer does."""
    saved = newest(run)
    return saved.step if saved else 0


def stored_config(run: Location) -> Config:
    """The config that a run was started with. Raises DataError if there is no such run."""
    place = run / "config.json"
    try:
        values = json.loads(read_bytes(place))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is not a run's config", fix="Was it edited by hand?") from error
    return from_dict(Config, values, str(place))


def claim(run: Location, config: Config, manifest_sha256: str) -> None:
    """Write config and data set identity into the run's folder, or check that they are the ones there.

    Raises SettingsError, naming the fields, if the folder belongs to another config or data set.
    """
    place = run / "config.json"
    if not exists(place):
        content = {"config": to_dict(config), "manifest_sha256": manifest_sha256}
        write_bytes(place, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        return
    changed = differing_fields(stored_config(run), config)
    if json.loads(read_bytes(place))["manifest_sha256"] != manifest_sha256:
        changed.append("the data set (its manifest has another sha256)")
    if changed:
        raise SettingsError(
            f"run {run} was started with other settings: {', '.join(changed)}",
            fix="Use the settings it was started with, or leave out --resume for a run of its own.",
        )


def leave_failure(run: Location, error: FlamError) -> None:
    """Leave an error in the run's folder for the driver to raise."""
    write_bytes(run / "failure.json", pack(error).encode())


def failure(run: Location) -> FlamError | None:
    """The error that a worker left, if any."""
    if not exists(run / "failure.json"):
        return None
    return unpack(read_bytes(run / "failure.json").decode())


def clear_failure(run: Location) -> None:
    """Forget the error of an earlier attempt."""
    if exists(run / "failure.json"):
        run.fs.delete_file((run / "failure.json").path)


def _committed(run: Location) -> list[int]:
    index = run / "checkpoints" / "index.json"
    return sorted(json.loads(read_bytes(index))) if exists(index) else []


def _name(step: int) -> str:
    return f"step-{step:08d}"
