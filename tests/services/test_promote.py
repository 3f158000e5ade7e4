"""Promotion on a real MLflow server: who becomes champion, who does not, two at once, and the way back."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flam_core
from flam_core.config_evaluation import EvaluationConfig
from flam_core.config_json import canonical_json, to_dict
from flam_core.data.manifest import read_manifest
from flam_core.errors import DataError, EnvironmentFault, FlamError, SettingsError
from flam_core.model import Flam
from flam_core.recipes import get_recipe
from flam_core.saved_model import save_model
from services.registry import register
from services.registry.champion import Champions
from services.registry.gate import Decision, Margins
from services.registry.promote import Promotion, promote
from services.storage import resolve
from services.tracking.run import open_run
from tests.services.conftest import Tracking, environment, run_job, said, sha256

pytestmark = pytest.mark.slow

SMALL = EvaluationConfig(clips=8, horizon=4, probe_clips=8, long_clips=4, long_horizon=8)
WIDE = Margins(dci=1.0, leakage=1.0, usage=1.0, long_rollout_db=100.0, latency_share=100.0)
REFUSED = 6


class Shelf:
    """Models on a server, under one name."""

    def __init__(self, tracking: Tracking, name: str, data: Path, folder: Path) -> None:
        self.tracking, self.name, self.data, self._folder = tracking, name, data, folder

    def put(self, model: Flam, run: str) -> str:
        """Register it as a run of its own; the version."""
        location = resolve(self.data)
        manifest = read_manifest(location.fs, location.path).sha256
        tags = {"manifest_sha256": manifest, "evaluation": canonical_json(to_dict(SMALL))}
        info = open_run(self.tracking.uri, "promote", f"{self.name}-{run}", {}, {"data": str(self.data)})
        save_model(model, self._folder / run, "# A model\n")
        example = np.zeros((1, 2, 48, 48, 3), dtype=np.uint8)
        return register(info, self.name, self._folder / run, example, tags)

    def crown(self, version: str) -> None:
        """As an administrator can."""
        self.tracking.client.set_registered_model_alias(self.name, "champion", version)

    def alias(self, alias: str) -> str | None:
        return self.tracking.client.get_registered_model(self.name).aliases.get(alias)

    def promote(self, version: str | None = None, *, dry_run: bool = False, **changes: Any) -> tuple[Decision, str]:
        promotion = Promotion(self.tracking.uri, self.name, version, **changes)
        return promote(promotion, WIDE, dry_run=dry_run)


def model(noise: float = 0.0) -> Flam:
    """A fresh model, which draws grey frames; with noise on its decoder, worse ones."""
    torch.manual_seed(0)
    config = get_recipe("smoke")
    made = Flam(config.tokenizer, config.model).eval()
    with torch.no_grad():
        for parameter in made.tokenizer.decoder.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return made


@pytest.fixture
def shelf(mlflow_server: Tracking, grid_data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Shelf:
    return Shelf(mlflow_server, f"flam-{request.node.name.replace('_', '-')[:60]}", grid_data, tmp_path)


def test_a_better_candidate_becomes_champion_and_the_way_back(shelf: Shelf) -> None:
    bad, good = shelf.put(model(noise=0.3), "bad"), shelf.put(model(), "good")
    shelf.crown(bad)
    decision, _ = shelf.promote(dry_run=True)
    assert decision.promoted
    assert (shelf.alias("champion"), shelf.alias("previous")) == (bad, None)

    decision, place = shelf.promote()
    assert decision.promoted, decision.why
    assert (shelf.alias("champion"), shelf.alias("previous")) == (good, bad)
    version = shelf.tracking.client.get_model_version(shelf.name, good)
    assert version.tags["gate"] == "promoted"
    path = shelf.tracking.client.download_artifacts(version.run_id, place)
    kept = json.loads(Path(path).read_text())
    assert kept["promoted"] is True
    assert kept["gain"]["low"] > 0
    assert kept["manifest_sha256"] == version.tags["manifest_sha256"]
    assert set(kept["metrics"]) == {good, bad}

    with pytest.raises(SettingsError, match="is the champion already"):
        shelf.promote()
    refused, _ = shelf.promote(bad)
    assert not refused.promoted
    assert shelf.alias("champion") == good
    assert shelf.tracking.client.get_model_version(shelf.name, bad).tags["gate"] == "refused"

    for now, before in ((bad, good), (good, bad)):
        arguments = ["promote", shelf.name, "--rollback", "--tracking", shelf.tracking.uri]
        done = run_job(arguments, environment(), shelf.data.parent)
        assert done.returncode == 0, said(done)
        assert (shelf.alias("champion"), shelf.alias("previous")) == (now, before)


def test_an_equal_model_is_refused_with_its_own_exit_code(shelf: Shelf) -> None:
    one, other = shelf.put(model(), "one"), shelf.put(model(), "other")
    shelf.crown(one)
    done = run_job(["promote", shelf.name, "--tracking", shelf.tracking.uri], environment(), shelf.data.parent)
    assert done.returncode == REFUSED, said(done)
    assert f"version {other} of {shelf.name} does not become champion: it is not shown to be better" in done.stderr
    assert shelf.alias("champion") == one


def test_two_promotions_at_once_cannot_both_win(shelf: Shelf) -> None:
    bad = shelf.put(model(noise=0.3), "bad")
    challengers = [shelf.put(model(noise=0.0), "one"), shelf.put(model(noise=0.02), "two")]
    shelf.crown(bad)
    outcomes: dict[str, Decision | FlamError] = {}

    def run(version: str) -> None:
        try:
            outcomes[version] = shelf.promote(version)[0]
        except FlamError as error:
            outcomes[version] = error

    threads = [threading.Thread(target=run, args=(version,)) for version in challengers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [version for version, found in outcomes.items() if isinstance(found, Decision) and found.promoted]
    assert len(won) == 1
    (lost,) = [found for version, found in outcomes.items() if version not in won]
    assert isinstance(lost, EnvironmentFault)
    assert "another promotion" in lost.what
    assert (shelf.alias("champion"), shelf.alias("previous")) == (won[0], bad)


@pytest.mark.parametrize(
    ("of_another", "said"),
    [(True, "another promotion of .* began at the same moment"), (False, "does not take the lock: .*refused here")],
    ids=["another", "nobody"],
)
def test_a_lock_that_the_database_refuses_is_told_by_who_has_it(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, of_another: bool, said: str
) -> None:
    """It refuses the second of two who add it in the same instant: one pair in a hundred, so it is made to."""
    shelf.put(model(), "one")
    database = sqlite3.connect(shelf.tracking.artifacts.parent / "mlflow.db", timeout=30, isolation_level=None)
    wait_for = Champions._wait_for

    def and_then_another_comes(champions: Champions, held: Any) -> None:
        wait_for(champions, held)
        if of_another:
            held = json.dumps({"token": "of another", "renewed": 0})
            shelf.tracking.client.set_registered_model_tag(shelf.name, "flam.promotion", held)
        for event in ("INSERT", "UPDATE"):
            refuse = f"CREATE TRIGGER refuse_{event} BEFORE {event} ON registered_model_tags"
            database.execute(f"{refuse} BEGIN SELECT RAISE(ABORT, 'refused here'); END")

    monkeypatch.setattr(Champions, "_wait_for", and_then_another_comes)
    try:
        with pytest.raises(EnvironmentFault, match=said), Champions(shelf.tracking.uri, shelf.name).lock():
            pass
    finally:
        for event in ("INSERT", "UPDATE"):
            database.execute(f"DROP TRIGGER IF EXISTS refuse_{event}")
        database.close()


def test_a_champion_that_changed_meanwhile_is_not_replaced(shelf: Shelf) -> None:
    versions = [shelf.put(model(noise=noise), f"run-{noise}") for noise in (0.3, 0.1, 0.0)]
    shelf.crown(versions[0])
    champions = Champions(shelf.tracking.uri, shelf.name)
    measured_against = champions.by_alias("champion")
    shelf.crown(versions[1])
    with pytest.raises(EnvironmentFault, match="has changed while this was measured: it is version 2 now"):
        champions.promote(champions.by_version(versions[2]), measured_against)
    assert shelf.alias("champion") == versions[1]


def test_a_lock_whose_holder_is_gone_is_taken_over(shelf: Shelf) -> None:
    shelf.put(model(), "one")
    champions = Champions(shelf.tracking.uri, shelf.name)
    held = json.dumps({"token": "of a process that was killed", "renewed": 3})
    shelf.tracking.client.set_registered_model_tag(shelf.name, "flam.promotion", held)
    with champions.lock():
        pass
    assert "flam.promotion" not in shelf.tracking.client.get_registered_model(shelf.name).tags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shelf: shelf.promote("99"), "has no version 99"),
        (lambda shelf: shelf.promote(manifest_sha256="0" * 64), "has changed: its manifest's sha256 is"),
        (lambda shelf: promote(Promotion(shelf.tracking.uri, "none"), WIDE), "has no registered model none"),
        (lambda shelf: Champions(shelf.tracking.uri, shelf.name).roll_back(), "has no previous champion"),
    ],
    ids=["version", "manifest", "model", "rollback"],
)
def test_what_is_not_there_is_named(shelf: Shelf, change: Callable[[Shelf], Any], message: str) -> None:
    shelf.put(model(), "one")
    with pytest.raises(DataError, match=message) as caught:
        change(shelf)
    assert caught.value.fix


def test_weights_that_somebody_replaced_are_refused(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = shelf.put(model(), "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shelf.tracking.uri)
    flam_core.load(f"models:/{shelf.name}/{version}")
    digest = shelf.tracking.client.get_model_version(shelf.name, version).tags["weights_sha256"]
    known = [place for place in shelf.tracking.artifacts.rglob("model.safetensors") if sha256(place) == digest]
    stored = max(known, key=lambda place: place.stat().st_mtime)
    save_model(model(noise=0.5), stored.parent, "# Another\n")
    with pytest.raises(DataError, match="are not those that were registered: their sha256 is"):
        flam_core.load(f"models:/{shelf.name}/{version}")
