"""Seeded permutations that need no memory and no generator, so that any element can be asked for by itself.

Everything here follows from 64-bit integer arithmetic alone: it is the same on every machine and with every version of
NumPy, whose own generators promise that only within one version.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = 4


def key(*parts: int) -> int:
    """A 64-bit number that depends on every part and on their order."""
    state = 0
    for part in parts:
        state = _scramble((state ^ (part & _MASK)) + _GAMMA & _MASK)
    return state


def hashed(keys: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """A random-looking uint64 for each of `values` (non-negative integers); `keys` is one `key` or one for each."""
    mixed = values.astype(np.uint64) * np.uint64(_GAMMA)
    mixed ^= np.asarray(keys, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def permutation(seed_key: int, size: int) -> np.ndarray:
    """A permutation of 0 .. size - 1, int64, all of it in memory."""
    return np.argsort(hashed(seed_key, np.arange(size)), kind="stable")


def permuted(keys: np.ndarray, values: np.ndarray, sizes: np.ndarray, bound: int) -> np.ndarray:
    """Element by element, where the permutation of 0 .. size - 1 with that key takes `value`; int64.

    keys uint64, values and sizes integers, 0 <= value < size <= bound. The outcome depends on `bound`, but not on what
    else is asked for in the same call. Constant memory and time in `sizes`: a Feistel network over the power of two
    from `bound` on, walked until it ends below the size (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """
    bits = max(2, (bound - 1).bit_length())
    low = bits // 2
    low_mask, high_mask, shift = np.uint64((1 << low) - 1), np.uint64((1 << (bits - low)) - 1), np.uint64(low)
    limits = sizes.astype(np.uint64)
    result = values.astype(np.uint64)
    walking = np.arange(len(result))
    current, current_keys = result.copy(), keys.astype(np.uint64)
    while len(walking):
        left, right = current >> shift, current & low_mask
        for turn in range(0, _ROUNDS, 2):
            left ^= hashed(current_keys + np.uint64(turn), right) & high_mask
            right ^= hashed(current_keys + np.uint64(turn + 1), left) & low_mask
        current = (left << shift) | right
        result[walking] = current
        outside = current >= limits[walking]
        walking, current, current_keys = walking[outside], current[outside], current_keys[outside]
    return result.astype(np.int64)


def _scramble(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
