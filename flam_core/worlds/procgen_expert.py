"""Scripted experts for bigfish and starpilot: they see every entity's place and speed, and look some steps ahead.

Nine plans are compared, one for each direction (and none) held for `_HORIZON` steps, with all others going on as they
do. A plan is worth what it earns, less what it risks, each the less the later; what it comes closer to decides between
plans that earn nothing. In starpilot a shot that will hit is worth more than any move that does not save the player.
"""

from __future__ import annotations

import numpy as np

EXPERTS = ("bigfish", "starpilot")
FIRE = 9
"""Starpilot's action."""
_NONE = 4
_HORIZON = 24
_DISCOUNT = 0.93
_DEATH = 40.0
_DRAG = 0.45  # of its speed the player keeps in a step; measured on both games: v' = drag * v + thrust * direction
_THRUST = {"bigfish": 0.225, "starpilot": 0.3375}  # cells a step
_PREY = 2  # bigfish: the others' type
_BULLET, _EXPLOSION, _CLOUD, _FINISH = 1, 54, 6, 9  # starpilot: these do no harm
_ENEMY_BULLETS = (2, 3)
_SHOT_SPEED = 0.8  # cells a step, of the player's bullets
_AIM = 0.6  # share of the two half heights within which a shot surely hits
_DIRECTIONS = np.array([(action // 3 - 1, action % 3 - 1) for action in range(9)], dtype=np.float64)  # x, y upwards


def expert_action(game: str, kinds: np.ndarray, numbers: np.ndarray, side: float) -> int:
    """What to do now, as Procgen numbers actions.

    kinds: int [n], types of the entities, the player's 0. numbers: float [n, 6]: x, y (upwards), their speeds a step,
    half width and half height, in cells. side: cells along each side of the view.
    """
    me = numbers[kinds == 0]
    if not len(me):
        return _NONE
    return (
        _bigfish(me[0], numbers[kinds == _PREY], side) if game == "bigfish" else _starpilot(me[0], kinds, numbers, side)
    )


def _plans(game: str, me: np.ndarray, side: float) -> np.ndarray:
    """Places [9, _HORIZON, 2] of the player under each plan."""
    at, speed, size = np.tile(me[:2], (9, 1)), np.tile(me[2:4], (9, 1)), me[4:6]
    found = np.empty((9, _HORIZON, 2))
    for step in range(_HORIZON):
        speed = _DRAG * speed + _THRUST[game] * _DIRECTIONS
        at = (at + speed).clip(size, side - size)
        found[:, step] = at
    return found


def _met(plans: np.ndarray, me: np.ndarray, others: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each plan touches each of the others bool [9, n], and the first step at which it does [9, n]."""
    ahead = np.arange(1, _HORIZON + 1)[:, None, None]
    paths = others[:, :2] + ahead * others[:, 2:4]  # [_HORIZON, n, 2]
    apart = abs(plans[:, :, None] - paths) - (me[4:6] + others[:, 4:6])
    touching = np.asarray((apart < margin).all(axis=-1))  # [9, _HORIZON, n]
    return np.any(touching, axis=1), np.argmax(touching, axis=1)


def _risk(plans: np.ndarray, me: np.ndarray, others: np.ndarray, margin: float) -> np.ndarray:
    """What each plan [9] risks."""
    touched, when = _met(plans, me, others, margin)
    return _DEATH * (touched * _DISCOUNT**when).max(axis=1, initial=0.0)


def _bigfish(me: np.ndarray, fish: np.ndarray, side: float) -> int:
    """Eat what is smaller, keep away from what is larger."""
    plans = _plans("bigfish", me, side)
    larger, smaller = fish[fish[:, 4] > me[4]], fish[fish[:, 4] <= me[4]]
    worth = -_risk(plans, me, larger, margin=0.25)
    if len(smaller):
        touched, when = _met(plans, me, smaller, margin=-0.1)
        worth += (touched * _DISCOUNT**when).sum(axis=1)
        meet = smaller[:, :2] + smaller[:, 2:4] * _HORIZON / 2
        inside = (meet > 0).all(axis=1) & (meet < side).all(axis=1)
        gaps = np.linalg.norm(plans[:, _HORIZON // 2, None] - meet, axis=-1) + 1e3 * ~inside
        worth -= 0.02 * gaps.min(axis=1).clip(max=side)
    else:
        worth -= 0.02 * np.linalg.norm(plans[:, -1] - side / 2, axis=-1)
    return int(worth.argmax())


def _starpilot(me: np.ndarray, kinds: np.ndarray, numbers: np.ndarray, side: float) -> int:
    """Shoot what can be hit, line up with what cannot yet, keep out of the way of everything."""
    harmless = np.isin(kinds, (0, _BULLET, _EXPLOSION, _CLOUD, _FINISH))
    plans = _plans("starpilot", me, side)
    risk = _risk(plans, me, numbers[~harmless], margin=0.3)
    enemies = numbers[~harmless & ~np.isin(kinds, _ENEMY_BULLETS)]
    waiting = enemies[(enemies[:, 0] > me[0] + 0.5) & (enemies[:, 0] < side + 1)]
    if len(waiting) and risk[_NONE] < 1.0 and _hits(me, waiting).any():
        return FIRE  # again and again: most take several hits
    worth = -risk
    if len(waiting):
        when = (waiting[:, 0] - me[0]) / (_SHOT_SPEED - waiting[:, 2])
        heights = waiting[:, 1] + when * waiting[:, 3]
        worth -= (0.1 * abs(plans[:, 3, None, 1] - heights) + 0.01 * when).min(axis=1)
        worth -= 0.02 * abs(plans[:, 3, 0] - 0.2 * side)
    else:
        worth -= 0.02 * np.linalg.norm(plans[:, -1] - (0.2 * side, side / 2), axis=-1)
    return int(worth.argmax())


def _hits(me: np.ndarray, enemies: np.ndarray) -> np.ndarray:
    """Whether a shot fired now will hit each enemy: bool [n]."""
    when = (enemies[:, 0] - me[0]) / (_SHOT_SPEED - enemies[:, 2])
    heights = enemies[:, 1] + when * enemies[:, 3]
    return abs(heights - me[1]) < _AIM * (me[5] + enemies[:, 5])
