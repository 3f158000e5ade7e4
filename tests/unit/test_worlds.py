"""The built-in worlds: what they record is reproducible, and their ground truth agrees with their pixels."""

from __future__ import annotations

import colorsys
import importlib.util
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.worlds import WORLDS, Episode, driving, make_world, multigrid, procgen
from flam_core.worlds.grid import ACTIONS, sprites

PACKAGES = {
    "multigrid": "multigrid",
    "bigfish": "procgen",
    "leaper": "procgen",
    "starpilot": "procgen",
    "driving": "highway_env",
}
FRAMES = 40


def record(name: str, count: int = 2, frames: int = FRAMES, seed: int = 0, **options: Any) -> list[Episode]:
    """Episodes of a world, or a skipped test if its simulator is not installed."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return list(make_world(name, **options).episodes(count, frames, seed))


def same(a: Episode, b: Episode) -> bool:
    """Whether two episodes are equal in every recorded number."""
    return (
        np.array_equal(a.frames, b.frames)
        and np.array_equal(a.actions, b.actions, equal_nan=True)
        and np.array_equal(a.positions, b.positions, equal_nan=True)
        and np.array_equal(rewards(a), rewards(b))
    )


def rewards(episode: Episode) -> np.ndarray:
    """Rewards [T], or an empty array for a world without."""
    return np.empty(0) if episode.rewards is None else episode.rewards


def pixel(frame: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The pixel [3] of a frame at (x, y) in [0, 1]."""
    height, width, _ = frame.shape
    return frame[min(int(position[1] * height), height - 1), min(int(position[0] * width), width - 1)]


# --- every world -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_episode_has_the_promised_shapes_and_types(name: str) -> None:
    episodes = record(name)
    world = make_world(name)
    slots = world.agents if name == "grid" else world.entities  # type: ignore[attr-defined]
    assert world.name == name
    assert world.licence in ("Apache-2.0", "MIT")
    assert len(episodes) == 2
    for episode in episodes:
        length = len(episode.frames)
        assert 1 <= length <= FRAMES
        assert episode.frames.shape == (length, world.frame_size, world.frame_size, 3)
        assert episode.actions.shape == (length, slots, 2 if name == "driving" else 1)
        assert episode.positions.shape == (length, slots, 2)
        assert episode.frames.dtype == np.uint8
        assert episode.actions.dtype == episode.positions.dtype == np.float32
        if episode.rewards is not None:
            assert episode.rewards.shape == (length,)
            assert episode.rewards.dtype == np.float32


@pytest.mark.parametrize("name", WORLDS)
def test_equal_seeds_give_equal_episodes_and_other_seeds_others(name: str) -> None:
    first, again, other = (record(name, seed=seed) for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert not same(first[0], first[1])


@pytest.mark.parametrize("name", WORLDS)
def test_frames_are_neither_black_nor_constant(name: str) -> None:
    for episode in record(name, frames=20):
        assert episode.frames[0].max() > 100
        assert len(np.unique(episode.frames[0].reshape(-1, 3), axis=0)) >= 4
        if len(episode.frames) > 5:
            assert (episode.frames[0] != episode.frames[-1]).any()


@pytest.mark.parametrize("name", WORLDS)
def test_positions_are_in_the_frame_or_nan(name: str) -> None:
    for episode in record(name):
        known = np.isfinite(episode.positions)
        assert (known[..., 0] == known[..., 1]).all()
        assert known.any()
        assert (episode.positions[known] >= 0).all()
        assert (episode.positions[known] <= 1).all()


@pytest.mark.parametrize("name", [n for n in WORLDS if n != "grid"])
def test_first_episodes_do_not_depend_on_how_many_follow(name: str) -> None:
    assert same(record(name, count=1)[0], record(name, count=2)[0])


# --- grid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agents", "cells", "walls", "size"), [(4, 8, 6, 64), (16, 8, 6, 64), (3, 5, 0, 40)])
def test_grid_draws_each_agent_where_it_is_and_nowhere_else(agents: int, cells: int, walls: int, size: int) -> None:
    pixels = size // cells
    atlas = sprites(agents, pixels).reshape(-1, pixels, pixels, 3)
    for episode in record("grid", count=3, agents=agents, cells=cells, walls=walls, frame_size=size):
        places = (episode.positions * cells - 0.5).round().astype(int)
        assert episode.positions == pytest.approx((places + 0.5) / cells, abs=1e-6)
        tiles = episode.frames.reshape(-1, cells, pixels, cells, pixels, 3).swapaxes(2, 3)  # [T, row, column, ...]
        wall = (tiles == atlas[1]).all(axis=(-3, -2, -1))
        assert (wall.sum(axis=(1, 2)) == walls).all()
        assert (wall == wall[0]).all()
        for t, where in enumerate(places):
            assert len({tuple(place) for place in where}) == agents, "two agents share a cell"
            for i, (column, row) in enumerate(where):
                assert not wall[t, row, column]
                assert (tiles[t, row, column] == atlas[2 + i]).all()
        floor = (tiles == atlas[0]).all(axis=(-3, -2, -1))
        assert (floor.sum(axis=(1, 2)) == cells**2 - walls - agents).all()


def test_grid_agents_move_by_their_own_action_only() -> None:
    moves = {"stay": (0, 0), "up": (0, -1), "right": (1, 0), "down": (0, 1), "left": (-1, 0)}  # (x, y)
    wanted = np.array([moves[action] for action in ACTIONS])
    moved = 0
    for episode in record("grid", count=4, agents=8):
        steps = (np.diff(episode.positions, axis=0) * 8).round().astype(int)
        own = wanted[episode.actions[:-1, :, 0].astype(int)]
        still = (steps == 0).all(axis=-1)
        assert ((steps == own).all(axis=-1) | still).all()
        moved += int((~still).sum())
    assert moved > 300


def test_grid_agent_moves_whenever_nothing_is_in_its_way() -> None:
    (episode,) = record("grid", count=1, frames=200, agents=1, walls=0, stay=0.0)
    x, y = ((episode.positions[:, 0] * 8) - 0.5).round().astype(int).T
    actions = episode.actions[:, 0, 0].astype(int)
    blocked = {1: y == 0, 2: x == 7, 3: y == 7, 4: x == 0}
    for t in range(199):
        assert (x[t + 1] != x[t] or y[t + 1] != y[t]) == (not blocked[actions[t]][t])


@pytest.mark.parametrize(
    "options",
    [{"agents": 0}, {"agents": 17}, {"frame_size": 63}, {"cells": 3}, {"walls": -1}, {"walls": 60}, {"stay": 1.5}],
)
def test_grid_refuses_settings_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="grid"):
        make_world("grid", **options)


# --- multigrid -------------------------------------------------------------------------------------------------------


def test_multigrid_agents_stand_where_their_colour_is() -> None:
    colours = pytest.importorskip("multigrid.core.constants").Color
    for episode in record("multigrid", entities=6, balls=0):
        for frame, places in zip(episode.frames, episode.positions, strict=True):
            assert len({tuple(place) for place in places.tolist()}) == 6
            for i, place in enumerate(places):
                assert pixel(frame, place) == pytest.approx(colours.from_index(i).rgb(), abs=90)


def test_multigrid_agents_move_one_cell_forward_and_only_then() -> None:
    (episode,) = record("multigrid", count=1, frames=300)
    steps = np.abs(np.diff(episode.positions, axis=0) * 8).round().sum(axis=-1)
    forward = episode.actions[:-1, :, 0] == multigrid.ACTIONS.index("forward")
    assert set(np.unique(steps)) == {0, 1}
    assert not steps[~forward].any()
    assert steps[forward].mean() > 0.15


def test_multigrid_agents_carry_balls_about() -> None:
    (episode,) = record("multigrid", count=1, frames=300, entities=1, balls=8)
    tiles = episode.frames.reshape(300, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(300, 64, -1)
    floor = (tiles == np.median(tiles[:, 9:-9].reshape(-1, tiles.shape[-1]), axis=0)).all(axis=-1)
    empty = floor.sum(axis=1)  # one cell more while the agent carries a ball
    assert set(np.unique(empty)) == {empty[0], empty[0] + 1}
    put_back = np.flatnonzero(np.diff(empty.astype(int)) == -1)
    balls = ~floor
    balls[
        np.arange(300),
        ((episode.positions[:, 0, 1] * 8).astype(int) * 8 + (episode.positions[:, 0, 0] * 8).astype(int)),
    ] = False
    assert len(put_back) > 0
    assert len({balls[t + 1].tobytes() for t in put_back}) > 1, "no ball changed its place"


def test_multigrid_holds_sixteen_agents() -> None:
    (episode,) = record("multigrid", count=1, entities=16, cells=16, frame_size=128)
    assert all(len({tuple(place) for place in places.tolist()}) == 16 for places in episode.positions)


# --- procgen ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", procgen.GAMES)
def test_procgen_knows_the_action_of_the_player_alone(name: str) -> None:
    for episode in record(name):
        player = episode.actions[:, 0, 0]
        assert (player == player.round()).all()
        assert ((player >= 0) & (player < 15)).all()
        assert np.isnan(episode.actions[:, 1:]).all()


@pytest.mark.parametrize("name", ["bigfish", "starpilot"])
@pytest.mark.parametrize("size", [64, 128])
def test_procgen_draws_something_at_each_position(name: str, size: int) -> None:
    hits = []
    for episode in record(name, count=30 if size == 64 else 3, backgrounds=False, frame_size=size):
        for frame, places in zip(episode.frames, episode.positions, strict=True):
            inner = ((places > 0.03) & (places < 0.97)).all(axis=-1)  # at an edge a sprite's rim may be all there is
            for place in places[inner]:
                x, y = (int(v * size) for v in place)
                hits.append(frame[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max() > 40)
        assert (episode.frames.max(axis=-1) > 40).mean() < 0.5, "the black background is what makes this a test"
    assert np.mean(hits) > 0.999


@pytest.mark.parametrize("name", procgen.GAMES)
def test_procgen_entities_keep_their_slot(name: str) -> None:
    met = 0
    for episode in record(name, count=4, frames=150):
        steps = np.linalg.norm(np.diff(episode.positions, axis=0), axis=-1)
        assert not (steps > 0.08).any(), "an entity jumped: a slot changed hands without an empty frame"
        met += int((np.isfinite(episode.positions[..., 0]).sum(axis=0) > 5).sum())
    assert met > 8


def test_procgen_player_goes_where_its_action_says() -> None:
    right, up = [], []
    for episode in record("bigfish", count=6, frames=150):
        step = np.diff(episode.positions[:, 0], axis=0)
        held = episode.actions[1:-1, 0, 0] == episode.actions[:-2, 0, 0]  # the fish needs a frame or two to turn
        action, step = episode.actions[1:-1, 0, 0][held].astype(int), step[1:][held]
        known = np.isfinite(step[:, 0])
        right.append(np.stack([action[known] // 3 - 1, step[known, 0]]))
        up.append(np.stack([action[known] % 3 - 1, -step[known, 1]]))
    assert np.corrcoef(np.concatenate(right, axis=1))[0, 1] > 0.7
    assert np.corrcoef(np.concatenate(up, axis=1))[0, 1] > 0.7


def test_procgen_state_of_another_layout_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="layout"):
        procgen.read_entities(struct.pack("<ii4s", 0, 4, b"maze"), "bigfish")


# --- driving ---------------------------------------------------------------------------------------------------------


def test_driving_paints_each_car_in_its_own_hue_at_its_position() -> None:
    wrong, seen = 0, 0
    for episode in record("driving"):
        for frame, places in zip(episode.frames, episode.positions, strict=True):
            for i in np.flatnonzero(np.isfinite(places[:, 0])):
                hue, saturation, _ = colorsys.rgb_to_hsv(*(pixel(frame, places[i]) / 255))
                apart = abs(hue - i / 6)
                wrong += saturation < 0.3 or min(apart, 1 - apart) > 0.06
                seen += 1
    assert seen > 200
    assert wrong <= 0.01 * seen


def test_driving_shows_the_lanes() -> None:
    frame = record("driving", count=1, frames=1)[0].frames[0].astype(int)
    grey = frame.max(axis=-1) - frame.min(axis=-1) < 12
    lines = grey & (frame.mean(axis=-1) > 115)
    assert 0.03 < lines.mean() < 0.4
    assert (grey & (frame.mean(axis=-1) < 115)).mean() > 0.4


def test_driving_actions_explain_the_motion() -> None:
    """The acceleration told is the change of speed seen, for cars in view over three frames."""
    told, done = [], []
    for episode in record("driving", frames=80):
        metres = episode.positions * 64
        speed = np.linalg.norm(np.diff(metres, axis=0), axis=-1) * 5
        change = np.diff(speed, axis=0) * 5
        action = (episode.actions[:-2, :, 0] + episode.actions[1:-1, :, 0]) / 2
        known = np.isfinite(change) & np.isfinite(action)
        told.append(action[known])
        done.append(change[known])
    assert np.corrcoef(np.concatenate(told), np.concatenate(done))[0, 1] > 0.7


def test_driving_draws_without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert same(record("driving", count=1, frames=3)[0], record("driving", count=1, frames=3)[0])
    assert len(np.unique(record("driving", count=1, frames=1)[0].frames.reshape(-1, 3), axis=0)) > 20


# --- make_world ------------------------------------------------------------------------------------------------------


def test_unknown_world_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'bigfish'") as caught:
        make_world("bigfihs")
    assert all(name in str(caught.value) for name in WORLDS)
    with pytest.raises(SettingsError, match="there is no world 'zzz'"):
        make_world("zzz")


@pytest.mark.parametrize("name", WORLDS)
def test_unknown_option_is_refused_with_the_fields(name: str) -> None:
    with pytest.raises(SettingsError, match="Did you mean 'frame_size'") as caught:
        make_world(name, framesize=64)
    assert "fps" in str(caught.value)
    assert "licence" not in str(caught.value)


def test_game_is_no_option() -> None:
    with pytest.raises(SettingsError, match="no option 'game'"):
        make_world("bigfish", game="maze")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("multigrid", {"entities": 0}),
        ("multigrid", {"cells": 3}),
        ("multigrid", {"frame_size": 65}),
        ("multigrid", {"walls": 40}),
        ("multigrid", {"persistence": -0.1}),
        ("bigfish", {"entities": 0}),
        ("leaper", {"frame_size": 100}),
        ("starpilot", {"difficulty": "absurd"}),
        ("bigfish", {"persistence": 2.0}),
        ("driving", {"entities": 17}),
        ("driving", {"frame_size": 8}),
        ("driving", {"view": 10.0}),
        ("driving", {"speeds": (5.0, 1.0)}),
        ("driving", {"persistence": 2.0}),
        ("driving", {"substeps": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"Choose|Give|Take|probability"):
        make_world(name, **options)


def test_procgen_world_refuses_another_game() -> None:
    with pytest.raises(SettingsError, match="game = 'maze'"):
        procgen.ProcgenWorld(game="maze")


@pytest.mark.parametrize("name", [n for n in WORLDS if n != "grid"])
def test_missing_package_is_reported_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'flam\[worlds\]'"):
        make_world(name)


@pytest.mark.parametrize(
    ("module", "world"),
    [
        (multigrid, multigrid.MultiGridWorld),
        (procgen, procgen.ProcgenWorld),
        (driving, driving.DrivingWorld),
    ],
)
def test_package_that_does_not_import_is_reported(
    module: Any, world: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(module, "import_module", refuse)
    with pytest.raises(EnvironmentFault, match=r"No module named .* pip install 'flam\[worlds\]'"):
        next(world().episodes(1, 1, 0))


def test_importing_the_worlds_imports_no_simulator() -> None:
    code = (
        "import sys, flam_core.worlds; "
        "print({'multigrid', 'procgen', 'gym', 'gym3', 'highway_env', 'gymnasium', 'pygame'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
