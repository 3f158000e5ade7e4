"""Three Procgen games (package `procgen2`): bigfish, leaper and starpilot, with every entity's true place.

The places are read from the serialised state of the game, which lists each entity as 31 four-byte fields.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.worlds.base import Episode
from flam_core.worlds.procgen_expert import EXPERTS, expert_action

GAMES = ("bigfish", "leaper", "starpilot")
# Both packages ask for numpy < 2 and run with numpy 2: an extra cannot hold them, so they are installed on their own.
INSTALL = "Run: pip install 'flam[worlds]' && pip install --no-deps procgen2==0.10.7 gym3==0.3.3"
FRAME_SIZES = (64, 128, 256, 512)
DIFFICULTIES = ("easy", "hard")
POLICIES = ("random", "expert")
_CHOICES = {"bigfish": 9, "leaper": 9, "starpilot": 10}  # the eight directions and none; starpilot's tenth fires
_DECORATION = {"bigfish": (), "leaper": (5,), "starpilot": (54,)}  # types: finish line; explosions
_PLAYER = 0  # the player's type, in each of the three games
_NATIVE, _LARGE = 64, 512
_THIN = 1.3  # rendered pixels: Procgen does not anti-alias, and sprites up to 1.16 were seen to leave no pixel at all
_EDGE = 0.12  # share of the frame: the player keeps this far from the edges, or comes back

# Fields of an entity in the serialised state. Those before the type are float32 in cells, y upwards.
_FIELDS, _X, _Y, _VX, _VY, _HALF_WIDTH, _HALF_HEIGHT, _TYPE, _AGE = 31, 0, 1, 2, 3, 4, 5, 6, 18
_WORDS_BEFORE_RNG, _WORDS_AFTER_RNG = 18, 15
_LEVELS = 2**30 - 1


@dataclass(frozen=True)
class ProcgenWorld:
    """One Procgen game, each episode a level of its own, seen whole (the camera of these three games stands still).

    Policy "expert" (bigfish, starpilot): the scripted one of `procgen_expert`, on levels of even number; those of odd
    number are for `play(..., held_out=True)`. Policy "random": random with persistence. The player holds a combination
    of keys and with probability 1 - `persistence` draws another, uniformly from the eight directions and none
    (starpilot: or fire), so that it crosses the picture. Directions that lead off an edge nearby are not drawn and not
    held: the player would spend most of an episode pressed against the edges (a grown bigfish is caught there for
    good).

    Entity 0 is the player and `actions[t, 0, 0]` is its action as Procgen numbers it (0-8 the directions, 4 none,
    9 fire); the game moves all others, whose actions are NaN. Another entity takes the lowest free slot when its
    centre first comes into view, keeps it while it lives, and leaves it empty for a frame at least; entities that find
    no free slot wait unrecorded. Explosions and the finish line are no entities, nor are at 64 px the smallest of the
    bigfish's prey, which the renderer may leave out. `rewards[t]` is what `actions[t]` earned. An episode ends early
    when the player dies or wins: often within a hundred frames.

    Procgen renders 64 px for its agents and 512 px for people. `frame_size` 64 is the former as it is; 512 the latter;
    128 and 256 are averaged down from it over whole blocks of pixels.
    """

    game: str = "bigfish"
    """bigfish, leaper or starpilot."""
    entities: int = 8
    """Slots, the player's included."""
    frame_size: int = 64
    """Height and width of a frame in pixels: 64, 128, 256 or 512."""
    difficulty: str = "easy"
    """Procgen's distribution of levels: easy or hard."""
    backgrounds: bool = True
    """Draw the games' pictures behind the entities; else black."""
    policy: str = "random"
    """Of the player in `episodes`: random, or for bigfish and starpilot expert."""
    persistence: float = 0.85
    """Probability that the random player keeps its action for another frame."""
    noise: float = 0.05
    """Probability that the expert does something drawn at random instead, so that its data show the way back."""
    fps: float = 15.0
    name: str = field(init=False)
    licence: str = "MIT"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.game)
        for setting, value, allowed in (
            ("game", self.game, GAMES),
            ("frame_size", self.frame_size, FRAME_SIZES),
            ("difficulty", self.difficulty, DIFFICULTIES),
            ("policy", self.policy, POLICIES if self.game in EXPERTS else POLICIES[:1]),
        ):
            if value not in allowed:
                raise SettingsError(f"procgen: {setting} = {value!r}", fix=f"Choose one of {allowed}.")
        if self.entities < 1:
            raise SettingsError(f"procgen: entities = {self.entities}", fix="Choose at least 1: the player.")
        for setting in ("persistence", "noise"):
            if not 0.0 <= (chance := getattr(self, setting)) <= 1.0:
                raise SettingsError(f"procgen: {setting} = {chance}", fix="It is a probability: choose 0 to 1.")

    @property
    def choices(self) -> int:
        """Actions of the player: 0 to choices - 1, as Procgen numbers them."""
        return _CHOICES[self.game]

    def play(self, seed: tuple[int, ...], *, held_out: bool = False) -> ProcgenGame:
        """A game at its first frame. Equal seeds and equal actions give equal games.

        Raises SettingsError for leaper.
        """
        if self.game not in EXPERTS:
            raise SettingsError(f"procgen: nobody plays {self.game}", fix=f"Choose one of {EXPERTS}.")
        level = 2 * int(np.random.default_rng((*seed, 3)).integers(_LEVELS)) + held_out
        return ProcgenGame(self, self._open(0, level))

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        """Yield `count` episodes of 1 to `frames` frames. Episode e depends on (seed, e) only."""
        for e in range(count):
            rng = np.random.default_rng((seed, e))
            seeds = int(rng.integers(2**31 - 1)), None
            if self.policy == "expert":
                seeds = 0, 2 * int(rng.integers(_LEVELS))
            game = self._open(*seeds)
            try:
                yield self._record(game, frames, rng)
            finally:
                game.close()

    def _open(self, seed: int, level: int | None = None) -> Any:
        """A running game at the first frame of a level: of that number, or of one that the seed draws."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the old gym it needs prints that it is unmaintained
                procgen = import_module("procgen")
        except ImportError as error:
            raise EnvironmentFault(f"{self.game}: the simulator is not installed ({error})", fix=INSTALL) from error
        return procgen.ProcgenGym3Env(
            num=1,
            env_name=self.game,
            rand_seed=seed,
            start_level=level or 0,
            num_levels=0 if level is None else 1,
            num_threads=0,
            distribution_mode=self.difficulty,
            use_backgrounds=self.backgrounds,
            render_mode=None if self.frame_size == _NATIVE else "rgb_array",
        )

    def _record(self, game: Any, frames: int, rng: np.random.Generator) -> Episode:
        """Play until the level ends or `frames` frames are there."""
        pictures = np.empty((frames, self.frame_size, self.frame_size, 3), dtype=np.uint8)
        actions = np.full((frames, self.entities, 1), np.nan, dtype=np.float32)
        positions = np.full((frames, self.entities, 2), np.nan, dtype=np.float32)
        rewards = np.zeros(frames, dtype=np.float32)
        rendered = _NATIVE if self.frame_size == _NATIVE else _LARGE
        slots = _Slots(self.entities, _DECORATION[self.game], _THIN / rendered)
        action, length = np.zeros(1, dtype=np.int32), 0
        for t in range(frames):
            pictures[t] = self._picture(game)
            entities = read_entities(game.get_state()[0], self.game)
            slots.see(entities, positions[t])
            action[0] = self._choose(entities, positions[t, 0], action[0] if t else None, rng)
            actions[t, 0, 0] = action[0]
            game.act(action)
            reward, _, first = game.observe()
            rewards[t], length = reward[0], t + 1
            if first[0]:  # what is seen now is the next level
                break
        return Episode(pictures[:length], actions[:length], positions[:length], rewards[:length])

    def _choose(
        self, entities: tuple[np.ndarray, float], position: np.ndarray, last: int | None, rng: np.random.Generator
    ) -> int:
        """The recorded player's next action; `last` is the one before."""
        if self.policy == "expert":
            return int(rng.integers(self.choices)) if rng.random() < self.noise else ask_expert(self.game, entities)
        sensible = [a for a in range(self.choices) if not _leaves(a, position)]
        if last is None or last not in sensible or rng.random() >= self.persistence:
            return int(rng.choice(sensible))
        return last

    def _picture(self, game: Any) -> np.ndarray:
        """The frame uint8 [H, W, 3] that the game shows."""
        if self.frame_size == _NATIVE:
            return game.observe()[1]["rgb"][0]
        large, block = game.get_info()[0]["rgb"], _LARGE // self.frame_size
        if block == 1:
            return large
        rows = large.reshape(self.frame_size, block, self.frame_size, block, 3).sum(axis=(1, 3), dtype=np.uint32)
        return (rows // block**2).astype(np.uint8)


class ProcgenGame:
    """One level that somebody plays."""

    def __init__(self, world: ProcgenWorld, game: Any) -> None:
        self.world, self._game = world, game

    def frame(self) -> np.ndarray:
        """What is seen now, uint8 [H, W, 3]."""
        return self.world._picture(self._game)

    def act(self, action: int) -> tuple[float, bool]:
        """What the action earned, and whether that was the end: the player died, or won."""
        self._game.act(np.array([action], dtype=np.int32))
        reward, _, first = self._game.observe()
        return float(reward[0]), bool(first[0])

    def expert(self) -> int:
        """What the scripted expert would do now."""
        return ask_expert(self.world.game, read_entities(self._game.get_state()[0], self.world.game))

    def close(self) -> None:
        """End the simulator."""
        self._game.close()


def ask_expert(game: str, entities: tuple[np.ndarray, float]) -> int:
    """The scripted expert's action, given what `read_entities` found."""
    words, side = entities
    return expert_action(game, words[:, _TYPE], words.view("<f4")[:, :_TYPE].astype(np.float64), side)


def _leaves(action: int, position: np.ndarray) -> bool:
    """Whether an action drives a player at (x, y), as shares of the frame, towards an edge that is near."""
    if action > 8:  # not a direction
        return False
    right, down = action // 3 - 1, 1 - action % 3  # as Procgen numbers its combinations of keys
    return any(
        (p < _EDGE and move < 0) or (p > 1 - _EDGE and move > 0)
        for p, move in zip(position, (right, down), strict=True)
    )


class _Slots:
    """Which slot each living entity has. The state has no names for entities: they are followed by age and motion."""

    def __init__(self, count: int, decoration: tuple[int, ...], thin: float) -> None:
        """`decoration` are types to pass over; what is thinner than `thin`, as a share of the frame, is not in view."""
        self.decoration, self.thin = decoration, thin
        self.free = [True] * count
        self.seen: list[tuple[list[int], list[float], int | None]] = []  # integers, floats, slot of each, as listed

    def see(self, entities: tuple[np.ndarray, float], positions: np.ndarray) -> None:
        """Take in the entities of the next frame and write where they are into positions [N, 2]."""
        words, side = entities
        free_before = [slot for slot in range(1, len(self.free)) if self.free[slot]]
        now: list[tuple[list[int], list[float], int | None]] = []
        cursor = 0
        self.free = [True] * len(self.free)
        for integers, floats in zip(words.tolist(), words.view("<f4").tolist(), strict=True):
            if integers[_TYPE] in self.decoration:
                continue
            x, y = floats[_X] / side, 1.0 - floats[_Y] / side
            thick = 2 * min(floats[_HALF_WIDTH], floats[_HALF_HEIGHT]) / side >= self.thin
            in_view = thick and 0.0 <= x <= 1.0 and 0.0 <= y <= 1.0
            slot: int | None = None
            if integers[_TYPE] == _PLAYER:
                slot = 0
            else:
                # The game keeps its list in order of birth, so what died is passed over and not looked at again.
                match = next((i for i in range(cursor, len(self.seen)) if _same(self.seen[i], integers, floats)), None)
                if match is not None:
                    cursor, slot = match + 1, self.seen[match][2]
                if slot is None and free_before and in_view:
                    slot = free_before.pop(0)
            if slot is not None:
                self.free[slot] = False
                if in_view:
                    positions[slot] = x, y
            now.append((integers, floats, slot))
        self.seen = now


def _same(before: tuple[list[int], list[float], int | None], integers: list[int], floats: list[float]) -> bool:
    """Whether an entity is the one of the frame before: same type, one step older, no further off than its speed."""
    old_integers, old_floats, _ = before
    if integers[_TYPE] != old_integers[_TYPE] or integers[_AGE] != old_integers[_AGE] + 1:
        return False
    speed = max(math.hypot(old_floats[_VX], old_floats[_VY]), math.hypot(floats[_VX], floats[_VY]))
    return math.hypot(floats[_X] - old_floats[_X], floats[_Y] - old_floats[_Y]) <= speed + 0.1


def read_entities(state: bytes, game: str) -> tuple[np.ndarray, float]:
    """The entities int32 [entities, 31] in a serialised state of Procgen, and the cells along each side of the view.

    View the words as float32 to read the fields that are numbers with a point.
    """
    _, length = struct.unpack_from("<ii", state)
    if state[8 : 8 + length] != game.encode():
        raise EnvironmentFault(f"{game}: the state of this version of procgen2 has another layout", fix=INSTALL)
    at = 8 + length + 4 * _WORDS_BEFORE_RNG
    at += 4 + struct.unpack_from("<i", state, at)[0]  # two random generators as text, a word between them
    at += 4
    at += 4 + struct.unpack_from("<i", state, at)[0]
    at += 4 * _WORDS_AFTER_RNG
    cells, count = struct.unpack_from("<ii", state, at)
    words = np.frombuffer(state, dtype="<i4", count=count * _FIELDS, offset=at + 8).reshape(count, _FIELDS)
    return words, math.sqrt(cells)
