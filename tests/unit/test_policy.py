"""Policies: the goal task and its expert, the player's slot, the decoder, behaviour cloning, and playing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.context import HeldOutClip
from flam_core.model import Flam
from flam_core.policy import (
    Demonstrations,
    PolicyConfig,
    PolicyNetwork,
    clone,
    expert_player,
    fit_decoder,
    infer_latents,
    network_player,
    play_games,
    random_player,
    top_actions,
)
from flam_core.policy.decoder import LEAST_LABELS
from flam_core.recipes import get_recipe
from flam_core.worlds import PLAYABLE, make_playable, make_world
from flam_core.worlds.goal import GoalWorld, is_held_out
from flam_core.worlds.procgen import ProcgenWorld

CPU = torch.device("cpu")
SMALL = GoalWorld(others=0, cells=4, walls=2, frame_size=16)
POLICY = PolicyConfig(channels=(16,), hidden=64, steps=250, learning_rate=3e-3, precision="fp32")


def play(world: GoalWorld, seed: tuple[int, ...], actions: list[int]) -> tuple[list[np.ndarray], float]:
    """The frames and the return of a game in which the player does these things."""
    game = world.play(seed)
    frames, earned = [game.frame()], 0.0
    for action in actions:
        earned += game.act(action)[0]
        frames.append(game.frame())
    return frames, earned


def demonstrations(world: GoalWorld, count: int, frames: int, seed: int = 0) -> Demonstrations:
    episodes = world.episodes(count, frames, seed)
    return Demonstrations.of(
        [HeldOutClip(str(i), str(i), e.frames, e.positions, e.actions) for i, e in enumerate(episodes)], world.choices
    )


# --- the goal task ---------------------------------------------------------------------------------------------------


def test_the_expert_takes_shortest_paths_and_gets_to_every_goal() -> None:
    for seed in range(20):
        game = SMALL.play((seed,))
        for _ in range(5):
            (x, y), (goal_x, goal_y) = game.positions() * SMALL.cells
            steps, earned = 0, 0.0
            while not earned:
                earned, ended = game.act(game.expert())
                steps += 1
                assert not ended
                assert steps < SMALL.cells**2, "walked in circles"
            assert steps >= abs(x - goal_x) + abs(y - goal_y)
            assert steps <= 10  # with two walls on 4 x 4 cells no way round is longer


def test_on_an_open_grid_the_expert_needs_as_many_steps_as_the_goal_is_away() -> None:
    world = GoalWorld(others=0, cells=6, walls=1, frame_size=24)
    exact = 0
    for seed in range(30):
        game = world.play((seed,))
        player, goal = game.positions() * 6
        away = round(float(abs(player - goal).sum()))
        for _ in range(away - 1):
            assert game.act(game.expert())[0] == 0.0
        exact += game.act(game.expert())[0] == 1.0
    assert exact >= 28  # the one wall lies in the way of those on one line


def test_equal_games_are_equal_to_the_pixel_and_asking_the_expert_changes_nothing() -> None:
    world = GoalWorld(others=3)
    actions = np.random.default_rng(0).integers(5, size=60).tolist()
    first, earned = play(world, (3, 1), actions)
    again, earned_again = play(world, (3, 1), actions)
    assert earned == earned_again
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    game = world.play((3, 1))
    for action, frame in zip(actions, first, strict=False):
        assert np.array_equal(game.frame(), frame)
        game.expert()
        game.act(action)
    other, _ = play(world, (3, 2), actions)
    assert not np.array_equal(first[0], other[0])


def test_recorded_actions_played_again_earn_and_show_the_same() -> None:
    world = GoalWorld(others=2, noise=0.2)
    (episode,) = world.episodes(1, 80, 7)
    assert episode.rewards is not None
    game = world.play((7, 0))
    for t in range(80):
        assert np.array_equal(game.frame(), episode.frames[t])
        assert game.positions() == pytest.approx(episode.positions[t])
        reward, _ = game.act(int(episode.actions[t, 0, 0]))
        assert reward == episode.rewards[t]
    assert episode.rewards.sum() > 3


def test_levels_of_games_are_never_those_of_the_data() -> None:
    world = GoalWorld(others=1, cells=4, walls=2, frame_size=16)
    shown = {world.play((0, e)).walls for e in range(200)}
    unseen = {world.play((0, e), held_out=True).walls for e in range(60)}
    assert len(shown) > 50  # of 120 layouts, less those that fall apart
    assert len(unseen) > 10
    assert not shown & unseen
    assert all(is_held_out(np.array(walls)) for walls in unseen)


def test_the_goal_is_seen_where_it_is_and_nobody_else_stands_on_it() -> None:
    world = GoalWorld(others=6, cells=5, walls=3, frame_size=40, policy="random")
    (episode,) = world.episodes(1, 150, 0)
    places = (episode.positions * 5 - 0.5).round().astype(int)
    tiles = episode.frames.reshape(-1, 5, 8, 5, 8, 3).swapaxes(2, 3)
    goal = [tiles[t, y, x] for t, (x, y) in enumerate(places[:, -1])]
    assert all(np.array_equal(goal[0], one) for one in goal)
    assert (goal[0] > 200).any()
    for now in places:
        assert len({tuple(place) for place in now.tolist()}) == world.entities
    assert episode.rewards is not None
    assert [bool(r) for r in episode.rewards[:-1]] == [not np.array_equal(a, b) for a, b in pairwise(places[:, -1])]
    assert np.isnan(episode.actions[:, -1]).all()
    assert np.isfinite(episode.actions[:, :-1]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"others": -1},
        {"walls": 0},
        {"walls": 40},
        {"frame_size": 63},
        {"cells": 3, "frame_size": 24, "others": 6, "walls": 1},
        {"policy": "best"},
        {"noise": 2.0},
    ],
)
def test_goal_refuses_settings_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="goal"):
        make_world("goal", **options)


def test_only_worlds_with_a_player_can_be_played() -> None:
    with pytest.raises(SettingsError, match="nobody plays"):
        make_playable("grid")
    with pytest.raises(SettingsError, match="Did you mean"):
        make_playable("gaol")
    assert "goal" in PLAYABLE


@pytest.mark.parametrize(("name", "least"), [("bigfish", 6.0), ("starpilot", 5.0)])
def test_procgen_experts_earn_what_chance_does_not_and_games_repeat(name: str, least: float) -> None:
    pytest.importorskip("procgen")
    world = make_playable(name, policy="expert", backgrounds=False)
    earned = play_games(world, expert_player, games=2, steps=250, seed=1)
    chance = play_games(world, random_player(world.choices, 0), games=4, steps=250, seed=1)
    assert earned.mean() > max(least, chance.mean() + 4)
    games = [world.play((4, 2), held_out=True) for _ in range(2)]
    for _ in range(30):
        assert np.array_equal(games[0].frame(), games[1].frame())
        action = games[0].expert()
        assert games[0].act(action) == games[1].act(action)
    for game in games:
        game.close()
    (episode,) = world.episodes(1, 60, 0)
    assert episode.rewards is not None
    assert np.isfinite(episode.actions[:, 0]).all()


@pytest.mark.parametrize("name", ["bigfish", "starpilot"])
def test_procgen_games_are_on_other_levels_than_the_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("procgen")
    opened: list[int | None] = []
    own = ProcgenWorld._open

    def open_level(self: ProcgenWorld, seed: int, level: int | None = None) -> Any:
        opened.append(level)
        return own(self, seed, level)

    monkeypatch.setattr(ProcgenWorld, "_open", open_level)
    world = make_playable(name, policy="expert", backgrounds=False)
    assert len(list(world.episodes(20, 2, 0))) == 20
    shown = set(opened)
    opened.clear()
    play_games(world, random_player(world.choices, 0), games=20, steps=2, seed=0)
    played = set(opened)
    assert len(shown) > 10
    assert len(played) > 10
    assert None not in shown | played
    assert not shown & played


# --- demonstrations --------------------------------------------------------------------------------------------------


def test_transitions_stay_within_clips_and_stacks_begin_with_the_first_frame() -> None:
    rng = np.random.default_rng(0)
    clips = [
        HeldOutClip(
            str(length),
            "e",
            rng.integers(0, 256, (length, 4, 4, 3), dtype=np.uint8),
            actions=np.full((length, 2, 1), length % 5, dtype=np.float32),
        )
        for length in (3, 5)
    ]
    found = Demonstrations.of(clips, 5)
    assert found.transitions.tolist() == [0, 1, 3, 4, 5, 6]
    assert found.actions.tolist() == [3, 3, 0, 0, 0, 0]
    assert [len(clip) for clip in found.clips] == [3, 5]
    stacked = found.stacked(np.array([1, 2, 5]), 3)
    assert np.array_equal(stacked[0], found.frames[[0, 0, 1]])
    assert np.array_equal(stacked[1], found.frames[[3, 3, 3]])
    assert np.array_equal(stacked[2], found.frames[[4, 5, 6]])


def test_clips_without_the_players_actions_are_refused() -> None:
    frames = np.zeros((4, 4, 4, 3), dtype=np.uint8)
    for actions in (None, np.full((4, 1, 1), np.nan, dtype=np.float32), np.full((4, 1, 1), 5, dtype=np.float32)):
        with pytest.raises(DataError, match="clip odd"):
            Demonstrations.of([HeldOutClip("odd", "e", frames, actions=actions)], 5)


# --- decoder ---------------------------------------------------------------------------------------------------------


def latents_of(actions: np.ndarray, slot: int, seed: int = 0) -> np.ndarray:
    """Latent actions [n, 4, 6] of which one slot's hold the action, noisily, and one other's half of them."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(5, 6)) * 3
    latents = rng.normal(size=(len(actions), 4, 6))
    latents[:, slot] += codes[actions]
    half = rng.random(len(actions)) < 0.5
    latents[half, (slot + 1) % 4] += codes[actions[half]]
    return latents.astype(np.float32)


@pytest.mark.parametrize("slot", [0, 3])
def test_the_players_slot_is_found_and_its_decoder_names_unseen_transitions(slot: int) -> None:
    actions = np.random.default_rng(1).integers(5, size=1500)
    latents = latents_of(actions, slot)
    decoder = fit_decoder(latents[:300], actions[:300], 5, POLICY, seed=0)
    assert decoder.slot == slot
    assert int(np.argmax(decoder.accuracy)) == slot
    guessed = decoder.probabilities(latents[300:])
    assert guessed.shape == (1200, 5)
    assert guessed.sum(axis=1) == pytest.approx(np.ones(1200), abs=1e-5)
    assert (guessed.argmax(axis=1) == actions[300:]).mean() > 0.9


def test_what_latents_cannot_tell_gets_soft_labels_and_unknown_actions_none() -> None:
    rng = np.random.default_rng(2)
    actions = rng.integers(1, 4, size=2000)  # 0 and 4 never occur
    latents = latents_of(actions, 2)
    blocked = rng.random(2000) < 0.3
    latents[blocked, 2] = 8.0 + 0.1 * rng.normal(size=(blocked.sum(), 6))  # the same whatever was told
    decoder = fit_decoder(latents[:1000], actions[:1000], 5, POLICY, seed=0)
    guessed = decoder.probabilities(latents[1000:])
    assert (guessed[:, [0, 4]] == 0).all()
    assert guessed[blocked[1000:]].max(axis=1).mean() < 0.55
    assert guessed[~blocked[1000:]].max(axis=1).mean() > 0.85


def test_too_few_labels_are_refused() -> None:
    actions = np.arange(LEAST_LABELS - 1) % 5
    with pytest.raises(DataError, match="labels"):
        fit_decoder(latents_of(actions, 0), actions, 5, POLICY, seed=0)
    with pytest.raises(DataError, match="1 different"):
        fit_decoder(latents_of(np.zeros(200, dtype=int), 0), np.zeros(200, dtype=int), 5, POLICY, seed=0)


# --- latent actions --------------------------------------------------------------------------------------------------


def test_latents_are_those_of_each_clip_alone_in_order() -> None:
    recipe = get_recipe("smoke")
    torch.manual_seed(0)
    model = Flam(recipe.tokenizer, recipe.model).eval()
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (length, 48, 48, 3), dtype=np.uint8) for length in (5, 3, 5, 4)]
    found = infer_latents(model, clips, batch=2)
    assert found.shape == (4 + 2 + 4 + 3, recipe.model.factors, recipe.model.action_dim)
    alone = [model.infer_actions(model.slots(model.encode(torch.from_numpy(clip)[None]))[0])[0] for clip in clips]
    assert found == pytest.approx(torch.cat(alone).numpy(), abs=1e-4)
    wide = infer_latents(model, clips, batch=2, window=1)
    before, own, after = np.split(wide, 3, axis=-1)
    assert np.array_equal(own, found)
    assert np.array_equal(after[:3], found[1:4])  # of the first clip
    assert np.array_equal(before[1:4], found[:3])
    assert not before[4].any()  # the second clip's first transition has none before it
    assert not after[5].any()
    with pytest.raises(SettingsError, match="48x48"):
        infer_latents(model, [clips[0][:, :32, :32]])


# --- cloning and playing ---------------------------------------------------------------------------------------------


def test_a_cloned_policy_reaches_goals_on_unseen_levels_and_repeats() -> None:
    seen, unseen = demonstrations(SMALL, 80, 33), demonstrations(SMALL, 10, 33, seed=9)
    targets = np.eye(5, dtype=np.float32)[seen.actions]
    policy = clone(seen, np.arange(len(targets)), targets, POLICY, 0, CPU)
    right = top_actions(policy, unseen, np.arange(len(unseen.actions))) == unseen.actions
    assert right.mean() > 0.5  # a tenth is noise, and often two directions are as good
    earned = play_games(SMALL, network_player(policy, 0), games=20, steps=32, seed=0)
    chance = play_games(SMALL, random_player(5, 0), games=20, steps=32, seed=0)
    best = play_games(SMALL, expert_player, games=20, steps=32, seed=0)
    assert chance.mean() + 2 < earned.mean() <= best.mean()
    assert np.array_equal(earned, play_games(SMALL, network_player(policy, 0), games=20, steps=32, seed=0))
    again = clone(seen, np.arange(len(targets)), targets, POLICY, 0, CPU)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_a_policy_is_cloned_from_the_chosen_frames_alone() -> None:
    seen = demonstrations(SMALL, 4, 20)
    chosen = np.arange(10)
    targets = np.eye(5, dtype=np.float32)[np.full(10, 3)]
    policy = clone(seen, chosen, targets, PolicyConfig(channels=(8,), hidden=16, steps=30, learning_rate=1e-2), 0, CPU)
    assert (top_actions(policy, seen, chosen) == 3).all()


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"channels": ()}, {"steps": 0}, {"stack": 0}, {"learning_rate": 0.0}):
        with pytest.raises(SettingsError, match="policy"):
            PolicyConfig(**wrong)
    seen = demonstrations(SMALL, 1, 5)
    deep = PolicyConfig(channels=(8,) * 5, steps=1)
    with pytest.raises(SettingsError, match="5 stages"):
        clone(seen, np.arange(4), np.eye(5, dtype=np.float32)[seen.actions], deep, 0, CPU)


def test_the_policy_that_does_best_on_held_out_labels_is_taken() -> None:
    seen = demonstrations(SMALL, 6, 33)
    chosen, held_out = np.arange(20), np.arange(100, 190)
    targets = np.eye(5, dtype=np.float32)[seen.actions[chosen]]
    by_heart = PolicyConfig(channels=(8,), hidden=32, steps=120, looks=12, learning_rate=1e-2, precision="fp32")

    def loss(policy: PolicyNetwork) -> float:
        with torch.no_grad():
            logits = policy(torch.from_numpy(seen.stacked(held_out, 1)))
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(seen.actions[held_out])).item()

    last = clone(seen, chosen, targets, by_heart, 0, CPU)
    best = clone(seen, chosen, targets, by_heart, 0, CPU, held_out)
    assert loss(best) < loss(last) - 0.1, (loss(best), loss(last))
