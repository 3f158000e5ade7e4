"""Settings: what is refused and how it is told, the JSON round trip, and the identity of a config."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flam_core.config import Config, LossConfig, ModelConfig, StageConfig, TokenizerConfig
from flam_core.config_evaluation import EvaluationConfig
from flam_core.config_json import canonical_json, differing_fields, from_dict, to_dict
from flam_core.errors import SettingsError
from flam_core.recipes import RECIPES, get_recipe


def stage(**changes: Any) -> StageConfig:
    return StageConfig(**{"steps": 2, "batch_clips": 2, "clip_frames": 4, **changes})


def given_tokenizer(flam_steps: int) -> Config:
    """A config whose tokenizer is given."""
    smoke = get_recipe("smoke")
    first, second = replace(smoke.tokenizer_stage, steps=0), replace(smoke.flam_stage, steps=flam_steps)
    return replace(smoke, tokenizer_stage=first, flam_stage=second, tokenizer_sha256="0" * 64)


def changed(values: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """`values` with the field at the dotted place `where` set."""
    values = copy.deepcopy(values)
    *parents, last = where.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_the_way_through_json(name: str) -> None:
    config = get_recipe(name)
    again = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)
    assert again.sha256() == config.sha256()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_knows_its_name(name: str) -> None:
    assert get_recipe(name).recipe == name


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"unknown recipe 'tinny'. Did you mean tiny\? Recipes: .*multigrid"):
        get_recipe("tinny")
    with pytest.raises(SettingsError, match=r"unknown recipe 'xyz'. Recipes: "):
        get_recipe("xyz")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("surprise", 1, "config has unknown fields surprise"),
        ("model.surprise", 1, "config.model has unknown fields surprise"),
        ("model", 3, "config.model is int, not an object"),
        ("model.factors", "4", "config.model.factors = '4'"),
        ("model.factors", 4.0, "config.model.factors = 4.0"),
        ("model.factors", True, "config.model.factors = True"),
        ("model.factors", None, "config.model.factors = None"),
        ("model.latent", "gauss", "config.model.latent = 'gauss'"),
        ("model.slot_focus", "2", "config.model.slot_focus = '2'"),
        ("model.slot_focus", False, "config.model.slot_focus = False"),
        ("tokenizer.channels", 64, "config.tokenizer.channels = 64"),
        ("tokenizer.channels", [64, "64"], "config.tokenizer.channels = '64'"),
        ("loss.beta_warmup", [0.1], "config.loss.beta_warmup"),
        ("recipe", 1, "config.recipe = 1"),
        ("model.factors", 0, "model.factors = 0"),
    ],
)
def test_a_wrong_field_is_named(where: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        from_dict(Config, changed(to_dict(get_recipe("smoke")), where, value))
    assert str(caught.value).startswith(message)


def test_a_missing_field_is_named() -> None:
    values = to_dict(get_recipe("smoke"))
    del values["flam_stage"]["steps"]
    with pytest.raises(SettingsError, match=r"config\.flam_stage is incomplete: .*'steps'"):
        from_dict(Config, values)


def test_fields_with_defaults_may_be_missing() -> None:
    values = to_dict(get_recipe("smoke"))
    del values["loss"], values["model"]["slot_focus"]
    assert from_dict(Config, values) == get_recipe("smoke")


def test_whole_numbers_are_taken_for_floats_and_lists_for_tuples() -> None:
    loss = from_dict(LossConfig, {"beta": 1, "beta_warmup": [0, 1]})
    assert loss == LossConfig(beta=1.0, beta_warmup=(0.0, 1.0))
    assert type(loss.beta) is float
    assert all(type(share) is float for share in loss.beta_warmup)


@given(
    beta=st.floats(0, 10, allow_nan=False),
    channels=st.lists(st.integers(1, 512), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    latent=st.sampled_from(["gaussian", "vq"]),
)
def test_any_config_survives_the_way_through_json(beta: float, channels: list[int], seed: int, latent: Any) -> None:
    base = get_recipe("smoke")
    config = replace(
        base,
        tokenizer=replace(base.tokenizer, frame_size=96, channels=tuple(channels)),
        model=replace(base.model, latent=latent),
        loss=LossConfig(beta=beta),
        seed=seed,
    )
    again = from_dict(Config, json.loads(canonical_json(to_dict(config))))
    assert again == config
    assert again.sha256() == config.sha256()


@given(st.integers(1, 64), st.integers(1, 256))
def test_factors_that_do_not_divide_the_latent_width_are_refused_with_some_that_do(factors: int, width: int) -> None:
    if width % factors == 0:
        assert ModelConfig(factors=factors, latent_width=width).action_dim * factors == width
        return
    with pytest.raises(SettingsError) as caught:
        ModelConfig(factors=factors, latent_width=width)
    assert f"latent_width {width}" in caught.value.what
    assert f"factors {factors}" in caught.value.what
    offered = caught.value.fix.removeprefix("Choose factors ").split(",")[0].split(" or ")
    assert offered
    for alternative in offered:
        ModelConfig(factors=int(alternative), latent_width=width)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenizerConfig(channels=()), "tokenizer.channels"),
        (lambda: TokenizerConfig(channels=(64, 0)), "tokenizer.channels"),
        (lambda: TokenizerConfig(frame_size=50, unshuffle=4, channels=(8,)), "frame_size 50 .* stride 8"),
        (lambda: TokenizerConfig(frame_size=0), "tokenizer.frame_size = 0"),
        (lambda: TokenizerConfig(unshuffle=0), "tokenizer.unshuffle = 0"),
        (lambda: TokenizerConfig(feature_dim=0), "tokenizer.feature_dim = 0"),
        (lambda: TokenizerConfig(fsq_levels=()), "fsq_levels"),
        (lambda: TokenizerConfig(fsq_levels=(4, 1)), "fsq_levels"),
        (lambda: ModelConfig(width=30, heads=4), "width 30 .*heads 4"),
        (lambda: ModelConfig(heads=0), "model.heads = 0"),
        (lambda: ModelConfig(latent="vq", codebook=1), "codebook"),
        (lambda: ModelConfig(latent="vq", factors=4, latent_width=4), "latent_width 4 leaves each of 4 slots"),
        (lambda: ModelConfig(slot_sharpness=0.0), "model.slot_sharpness = 0"),
        (lambda: ModelConfig(aggregator_sharpness=-1.0), "model.aggregator_sharpness = -1"),
        (lambda: ModelConfig(slot_focus=0.0), "model.slot_focus = 0"),
        (lambda: stage(steps=-1), "steps = -1"),
        (lambda: replace(get_recipe("smoke"), tokenizer_stage=stage(steps=0)), "tokenizer_stage.steps = 0"),
        (lambda: given_tokenizer(flam_steps=0), "flam_stage.steps = 0, and the tokenizer is given"),
        (lambda: replace(get_recipe("smoke"), tokenizer_sha256="0" * 64), "given tokenizer: 0000"),
        (lambda: stage(learning_rate=0.0), "learning_rate"),
        (lambda: stage(learning_rate=float("nan")), "learning_rate"),
        (lambda: stage(clip_norm=-1.0), "clip_norm"),
        (lambda: stage(warmup=-1), "warmup"),
        (lambda: LossConfig(beta_warmup=(0.9, 0.5)), "beta_warmup"),
        (lambda: LossConfig(beta_warmup=(0.0, 1.5)), "beta_warmup"),
        (lambda: LossConfig(bridge=-1.0), "negative"),
        (lambda: LossConfig(motion=-1.0), "negative"),
        (lambda: replace(get_recipe("tiny"), loss=LossConfig(motion=0.0)), "model.motion_readout with loss.motion 0"),
        (lambda: replace(get_recipe("smoke"), latent_freeze=1.5), "latent_freeze = 1.5"),
        (lambda: replace(get_recipe("tiny"), latent_freeze=0.2), "latent_freeze = 0.2"),
        (lambda: EvaluationConfig(horizon=0), "evaluation.horizon = 0"),
        (lambda: replace(get_recipe("smoke"), checkpoint_every=0), "checkpoint_every = 0"),
        (lambda: replace(get_recipe("smoke"), flam_stage=stage(clip_frames=1)), "no next frame"),
        (lambda: replace(get_recipe("smoke"), loss=LossConfig(rollout_steps=6)), "rollout_steps 6 .* 6 frames"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_way_out(make: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        make()
    assert caught.value.fix


def test_the_tokenizers_sizes_follow_from_its_fields() -> None:
    tokenizer = TokenizerConfig(frame_size=48, unshuffle=4, channels=(8, 8), fsq_levels=(4, 3))
    assert (tokenizer.stride, tokenizer.grid, tokenizer.patches, tokenizer.codes) == (16, 3, 9, 12)


def test_the_hash_is_that_of_sorted_json_without_spaces() -> None:
    # Run folders are named by it: written otherwise, runs that were started before could not be resumed.
    assert (
        canonical_json({"b": [1, 2.5, None], "a": {"d": True, "c": "x"}}) == '{"a":{"c":"x","d":true},"b":[1,2.5,null]}'
    )
    config = get_recipe("smoke")
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    assert config.sha256() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        replace(get_recipe("smoke"), seed=1),
        replace(get_recipe("smoke"), recipe="other"),
        replace(get_recipe("smoke"), model=replace(get_recipe("smoke").model, slot_focus=2.0)),
        replace(get_recipe("smoke"), loss=LossConfig(beta_warmup=(0.0, 0.1))),
    ],
)
def test_another_config_has_another_hash(other: Config) -> None:
    assert other != get_recipe("smoke")
    assert other.sha256() != get_recipe("smoke").sha256()


def test_equal_configs_have_equal_hashes() -> None:
    base = get_recipe("smoke")
    whole = replace(base, model=replace(base.model, slot_focus=2), loss=LossConfig(beta=0))
    point = replace(base, model=replace(base.model, slot_focus=2.0), loss=LossConfig(beta=0.0))
    assert whole == point
    assert whole.sha256() == point.sha256()


def test_differing_fields_names_each_with_both_values() -> None:
    ours = get_recipe("smoke")
    theirs = replace(ours, seed=3, model=replace(ours.model, factors=4), loss=LossConfig(beta_warmup=(0.0, 0.5)))
    assert differing_fields(ours, ours) == []
    assert differing_fields(theirs, ours) == [
        "model.factors (4 there, 2 here)",
        "loss.beta_warmup ((0.0, 0.5) there, (0.0, 0.0) here)",
        "seed (3 there, 0 here)",
    ]
