"""Saved models: they come back bit for bit, and what is no whole model is refused with its reason."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import flam_core
from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.errors import DataError, SettingsError
from flam_core.model import Flam
from flam_core.saved_model import (
    CARD,
    CONFIG,
    WEIGHTS,
    load,
    load_tokenizer,
    save_model,
    save_tokenizer,
    weights_from_bytes,
    weights_to_bytes,
)

TOKENIZER = TokenizerConfig(frame_size=16, unshuffle=4, channels=(8,), feature_dim=6)
MODEL = ModelConfig(factors=2, width=16, heads=2, blocks=1, iterations=2, latent_width=8)


def fresh(seed: int = 0, **changes: Any) -> Flam:
    torch.manual_seed(seed)
    model = Flam(TOKENIZER, replace(MODEL, **changes))
    frames = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    model.tokenizer.standardise(model.tokenizer.moments(frames))
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(fresh(), tmp_path / "saved", "# A card\n")
    return tmp_path / "saved"


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
def test_a_loaded_model_gives_bit_equal_outputs(tmp_path: Path, latent: str) -> None:
    model = fresh(seed=3, latent=latent, slot_competition="dual")
    save_model(model, tmp_path, "card")
    loaded = load(tmp_path)
    frames = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    slots, masks = model.slots(model.encode(frames))
    actions = model.infer_actions(slots)
    loaded_slots, loaded_masks = loaded.slots(loaded.encode(frames))
    assert torch.equal(slots, loaded_slots)
    assert torch.equal(masks, loaded_masks)
    assert torch.equal(actions, loaded.infer_actions(loaded_slots))
    assert torch.equal(model.rollout(frames[:, :1], actions), loaded.rollout(frames[:, :1], actions))
    assert loaded.tokenizer.config == model.tokenizer.config
    assert loaded.dynamics.config == model.dynamics.config
    assert not loaded.training


def test_shared_weights_are_written_once_and_stay_shared(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.dynamics.aggregator.position is loaded.dynamics.factorizer.position
    names = safetensors.torch.load_file(folder / WEIGHTS).keys()
    assert not any("aggregator.position" in name for name in names)
    assert any("factorizer.position" in name for name in names)


def test_a_folder_holds_weights_config_and_card_and_no_more(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert (folder / CARD).read_text() == "# A card\n"


def test_saving_is_reproducible(folder: Path, tmp_path: Path) -> None:
    save_model(load(folder), tmp_path / "again", "# A card\n")
    for name in (WEIGHTS, CONFIG, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_every_way_to_name_a_folder_works(tmp_path: Path) -> None:
    save_model(fresh(), tmp_path / "run" / "model", "card")
    whole = weights_to_bytes(fresh())
    for address in (tmp_path / "run" / "model", tmp_path / "run", f"{tmp_path}/run", f"file://{tmp_path}/run"):
        assert weights_to_bytes(flam_core.load(address)) == whole


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DataError, match=f"no model at .*: {missing} is missing"):
        load(folder)


def test_a_place_without_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights")
    for place in (tmp_path, tmp_path / "none", tmp_path / "model.pt"):
        with pytest.raises(DataError, match="no model at"):
            load(place)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: pickle.dumps({"weights": [1.0, 2.0]}),
    ],
    ids=["half", "header cut", "empty", "header overwritten", "pickle"],
)
def test_damaged_weights_are_refused(folder: Path, damage: Any) -> None:
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="is not what was saved: its sha256"):
        load(folder)
    with pytest.raises(DataError, match="weights cannot be read"):
        weights_from_bytes(fresh(), path.read_bytes())


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_code_never_runs(folder: Path, tmp_path: Path) -> None:
    torch.save(_Trap(tmp_path / "ran"), folder / WEIGHTS)
    with pytest.raises(DataError):
        load(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Trap(tmp_path / "ran")))
    with pytest.raises(DataError):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 3', "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", "is of format None, and this flam reads 3"),
        ('{"model_type": "llama"}', "is of format None"),
        ('{"format": 2}', "is of format 2, .* another flam"),
        ('{"format": 4}', "is of format 4, .* update flam"),
        ('{"format": 3}', "is not what was saved"),
        ('{"format": 3, "weights_sha256": "HASH", "model": {}}', "tokenizer is NoneType"),
        ('{"format": 3, "weights_sha256": "HASH", "tokenizer": {"size": 3}, "model": {}}', "unknown fields size"),
        ('{"format": 3, "weights_sha256": "HASH", "tokenizer": {}, "model": {"factors": "4"}}', "model.factors = '4'"),
        ('{"format": 3, "weights_sha256": "HASH", "tokenizer": {}, "model": {"factors": 3}}', "not divisible by"),
        ('{"format": 3, "weights_sha256": "HASH", "tokenizer": {}}', "is a tokenizer alone"),
    ],
)
def test_a_config_that_is_not_flams_is_refused(folder: Path, text: str, message: str) -> None:
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(text.replace("HASH", digest))
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert str(folder) in caught.value.what


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(weights_to_bytes(fresh(seed=5)))
    with pytest.raises(DataError, match="is not what was saved: its sha256") as caught:
        load(folder)
    assert WEIGHTS in caught.value.what


def test_a_tokenizer_alone_comes_back_bit_for_bit_and_is_no_model(tmp_path: Path) -> None:
    tokenizer = fresh(seed=4).tokenizer
    save_tokenizer(tokenizer, tmp_path / "run" / "model", "# A card\n")
    assert weights_to_bytes(load_tokenizer(tmp_path / "run")) == weights_to_bytes(tokenizer)
    with pytest.raises(DataError, match="is a tokenizer alone") as caught:
        load(tmp_path / "run")
    assert "--tokenizer_from" in caught.value.fix


def test_the_tokenizer_of_a_model_is_found_too(folder: Path) -> None:
    assert weights_to_bytes(load_tokenizer(folder)) == weights_to_bytes(load(folder).tokenizer)


def test_a_config_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\x80\x04\x95")
    with pytest.raises(DataError, match="is not JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "weight"),
    [
        ("model", "factors", 4, "dynamics.factorizer.initial"),
        ("model", "iterations", 1, r"dynamics.factorizer.temporal.1"),
        ("tokenizer", "feature_dim", 8, "dynamics.aggregator.features.weight"),
    ],
)
def test_weights_of_another_shape_are_named(folder: Path, part: str, field: str, value: int, weight: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config[part][field] = value
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"weights do not fit the model: .*{weight}.* differ"):
        load(folder)


def test_weights_that_do_not_fit_leave_the_model_as_it_was() -> None:
    model = fresh(seed=1)
    before = weights_to_bytes(model)
    with pytest.raises(DataError):
        weights_from_bytes(model, weights_to_bytes(fresh(seed=2, factors=4)))
    assert weights_to_bytes(model) == before


@pytest.mark.parametrize("address", ["s3://bucket/model", "ftp://host/model", "nonsense:/flam/1"])
def test_an_unknown_scheme_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown scheme {address.partition(':')[0]}:/") as caught:
        load(address)
    assert "models:/" in caught.value.fix
