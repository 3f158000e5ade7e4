"""Ground truth as other people write it, brought to the arrays of `Truth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flam_core.data.shard import Truth
from flam_core.data.videos import Unusable

TRUTH_FIELDS = ("actions", "positions", "rewards")
_SHAPES = {"actions": "[T, N, A]", "positions": "[T, N, 2]", "rewards": "[T]"}


def make_truth(fields: Mapping[str, Any]) -> Truth | None:
    """The truth in `actions` [T, N, A], `positions` [T, N, 2] and `rewards` [T], float32; None if all are missing.

    Without an axis of entities there is one entity: actions [T, A] or [T] (one number each), positions [T, 2].
    Values are arrays or nested lists; None in a list means not known (NaN). Raises Unusable, naming the field, if
    they are of other shapes or do not agree.
    """
    arrays = {name: _array(name, fields[name]) for name in TRUTH_FIELDS if fields.get(name) is not None}
    if not arrays:
        return None
    actions, positions, rewards = (arrays.get(name) for name in TRUTH_FIELDS)
    if actions is not None:
        actions = actions[:, None, None] if actions.ndim == 1 else actions
        actions = actions[:, None, :] if actions.ndim == 2 else actions
        if actions.ndim != 3:
            raise _wrong("actions", arrays["actions"])
    if positions is not None:
        positions = positions[:, None, :] if positions.ndim == 2 else positions
        if positions.ndim != 3 or positions.shape[2] != 2:
            raise _wrong("positions", arrays["positions"])
    if rewards is not None and rewards.ndim != 1:
        raise _wrong("rewards", rewards)
    if len({len(array) for array in arrays.values()}) > 1:
        raise Unusable("ground truth of different lengths: " + _lengths(arrays))
    if actions is not None and positions is not None and actions.shape[1] != positions.shape[1]:
        raise Unusable(f"actions of {actions.shape[1]} entities, but positions of {positions.shape[1]}")
    return Truth(actions, positions, rewards)


def truth_length(truth: Truth | None) -> int | None:
    """Frames that the truth is of; None without truth."""
    if truth is None:
        return None
    return next(len(array) for array in (truth.actions, truth.positions, truth.rewards) if array is not None)


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise Unusable(f"ground truth: {name} are not numbers of one regular shape {_SHAPES[name]}") from error
    if not array.ndim or not array.size:
        raise _wrong(name, array)
    return array


def _wrong(name: str, array: np.ndarray) -> Unusable:
    return Unusable(f"ground truth: {name} are {list(array.shape)}, not {_SHAPES[name]}")


def _lengths(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
