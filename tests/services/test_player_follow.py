"""A player follows its alias: what cannot be served leaves the old version in place, and is said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.model import Flam
from flam_core.saved_model import save_model
from flam_core.steering.discovered import save_actions
from services.player import models
from services.player.models import ServedModel
from services.registry.champion import Version
from tests.services.player_fixture import MODEL, SIZE, TOKENIZER, save_small_model, some_actions
from tests.services.test_player_sessions import CLIPS


class Registry:
    """Versions in folders, and an alias that moves."""

    moves = True

    def __init__(self, place: Path) -> None:
        self.place, self.meant, self.reads = place, "1", 0
        self.fault: Exception | None = None

    def now(self) -> Version:
        if self.fault is not None:
            raise self.fault
        return Version("flam", self.meant, "run", {})

    def download(self, address: str, _: str, __: Path) -> Path:
        self.reads += 1
        return self.place / address.rpartition("/")[2]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Versions 1 and 2 are alike, 3 is for larger frames."""
    for version in ("1", "2"):
        save_small_model(tmp_path / version, int(version))
    save_model(Flam(replace(TOKENIZER, frame_size=2 * SIZE), MODEL), tmp_path / "3", "# Larger\n")
    save_actions(some_actions(3), tmp_path / "3")
    made = Registry(tmp_path)
    monkeypatch.setattr(models, "Followed", lambda *_: made)
    monkeypatch.setattr(models, "download", made.download)
    return made


def followed() -> ServedModel:
    return ServedModel("models:/flam@champion", "", lambda: CLIPS, torch.device("cpu"), 0)


def test_a_version_for_other_frames_is_not_served(registry: Registry) -> None:
    model = followed()
    registry.meant = "3"
    model.look()
    assert model.current.version == "1"
    said = model.trouble or ""
    assert "version 3 cannot be used, version 1 is served on" in said
    assert f"{2 * SIZE}x{2 * SIZE}" in said
    model.look()
    assert (registry.reads, model.trouble) == (2, said)  # it is not read again and again
    registry.meant = "2"
    model.look()
    assert (model.current.version, model.trouble) == ("2", None)
    registry.meant = "3"
    with pytest.raises(SettingsError, match="takes frames of"):
        followed()


@pytest.mark.parametrize("fault", [EnvironmentFault("no MLflow"), OSError("no space left"), ValueError("of MLflow's")])
def test_whatever_goes_wrong_it_is_said_and_looked_for_again(registry: Registry, fault: Exception) -> None:
    model = followed()
    registry.fault = fault
    model.follow(0.01)
    until(lambda: model.trouble is not None)
    assert str(fault) in (model.trouble or "")
    registry.fault, registry.meant = None, "2"
    until(lambda: model.current.version == "2" and model.trouble is None)


def until(true: Callable[[], Any]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if true():
            return
        pause.wait(0.02)
    raise AssertionError("it did not come to pass")
