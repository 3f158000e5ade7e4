"""What results rest on: the model that was given, the expert data and its return, what FLAM took, the code."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flam_core.data.manifest import read_manifest
from flam_core.evaluation.stats import over_seeds
from flam_core.saved_model import WEIGHTS, model_folder, saved_sha256
from services.policy.plan import CLONED, Cell, PolicySettings, data_name, flam_place
from services.storage import resolve
from services.training.lineage import git_commit

_GIVEN = "given.json"
_REGISTRY = "models:/"
TRAINED = "training.json"
"""Beside a FLAM's weights: what it took."""


def with_model(settings: PolicySettings) -> PolicySettings:
    """The settings with a registered model's own files in the place of its address.

    An alias is asked for once: every task then reads the same weights, though the alias may move meanwhile. Raises
    DataError if there is no such model, EnvironmentFault if MLflow does not answer.
    """
    if settings.model is None or not settings.model.startswith(_REGISTRY):
        return settings
    from services.registry.follow import Followed  # MLflow takes seconds, which others need not wait for
    from services.registry.versions import download
    from services.tracking.server import default_tracking_uri

    tracking = settings.tracking or default_tracking_uri(Path(os.environ.get("FLAM_HOME", ".")).absolute())
    version = Followed(settings.model, tracking).now()
    with tempfile.TemporaryDirectory(prefix="flam-policy-") as place:
        found = download(version.address, tracking, Path(place))
        name = f"{version.name}-{version.version}-{saved_sha256(found)[:8]}"
        kept = Path(settings.folder).absolute() / "models" / name  # which all nodes see
        if not (kept / WEIGHTS).exists():
            part = kept.with_name(f".{name}")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(found, part)
            (part / _GIVEN).write_text(json.dumps({"address": settings.model, "version": version.version}) + "\n")
            part.replace(kept)
    return replace(settings, model=str(kept))


def model_used(model: str) -> dict[str, Any]:
    """A model's address, its version where a registry gave it, and the sha256 of its weights."""
    folder = model_folder(model)
    given = folder / _GIVEN
    named = json.loads(given.read_text()) if given.exists() else {"address": str(model), "version": None}
    return {**named, "weights_sha256": saved_sha256(folder)}


def evidence(settings: PolicySettings, cells: Iterable[Cell]) -> dict[str, Any]:
    """Of the cells that are done: `git_commit`, `model` (None: one a seed), `expert_data` of each environment and
    `flam_seconds` of each of its seeds; None where the files are no longer there."""
    folder, done = Path(settings.folder).absolute(), list(cells)
    data: dict[str, Any] = {}
    seconds: dict[str, dict[str, float | None]] = {}
    for env in dict.fromkeys(cell.env for cell in done if cell.method in CLONED):
        place = folder / "data" / data_name(settings, env)
        data[env] = expert_data(str(place)) if (place / "manifest.json").exists() else None
        seeds = sorted({cell.seed for cell in done if cell.env == env and cell.method == "flam"})
        if settings.model is None and seeds:
            seconds[env] = {str(seed): _seconds(flam_place(settings, env, seed) / TRAINED) for seed in seeds}
    model = None if settings.model is None else model_used(settings.model)
    return {"git_commit": git_commit(), "model": model, "expert_data": data, "flam_seconds": seconds}


@lru_cache(maxsize=16)
def expert_data(place: str) -> dict[str, Any]:
    """A data set's manifest sha256, its episodes, and the mean of what the expert earned in one, as it is recorded."""
    data = resolve(place)
    manifest = read_manifest(data.fs, data.path)
    earned: defaultdict[str, float] = defaultdict(float)
    for shard in manifest.shards:
        with data.fs.open_input_file(f"{data.path}/{shard.name}") as file:
            rows = pq.read_table(file, columns=["episode", "rewards"]).to_pylist()
        for row in rows:
            earned[row["episode"]] += sum(row["rewards"] or ())
    found = over_seeds(list(earned.values())).row
    return {"manifest_sha256": manifest.sha256, "episodes": len(earned), "return": found}


def _seconds(place: Path) -> float | None:
    return json.loads(place.read_text())["seconds"] if place.exists() else None
