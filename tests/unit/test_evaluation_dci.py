"""DCI against values known by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import entropy

from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.dci import MIN_SAMPLES, DCIResult, dci
from flam_core.evaluation.stats import Bootstrap


def positions(samples: int, agents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((samples, agents, 2)).astype(np.float32)


def embed(known: np.ndarray, seed: int, width: int = 12) -> np.ndarray:
    """Slots [N, width]: a fixed linear picture of `known` [N, m] in random directions, with a little noise."""
    directions = np.random.default_rng(99).normal(size=(known.shape[1], width))
    return known @ directions + 1e-3 * np.random.default_rng(seed).normal(size=(len(known), width))


def measure(build: Callable[[np.ndarray, int], np.ndarray], agents: int = 3, samples: int = 400) -> DCIResult:
    """DCI of the slots that `build(positions, seed)` makes, on independent train and test positions."""
    train, test = positions(samples, agents, 1), positions(samples, agents, 2)
    return dci(build(train, 3), train, build(test, 4), test)


def random_slots(count: int, samples: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(count, samples, 12)))


def test_one_slot_per_agent_is_perfect() -> None:
    result = measure(lambda p, s: np.stack([embed(p[:, a], s) for a in (2, 0, 1)], axis=1))
    assert (result.d, result.c, result.i, result.within) == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert result.matching == ((0, 2), (1, 0), (2, 1))
    assert set(result.metrics) == {
        *("dci/d", "dci/c", "dci/i", "dci/within"),
        *(f"probe/position_r2@{a}" for a in range(3)),
    }


def test_slots_that_all_know_everything_are_not_disentangled() -> None:
    result = measure(lambda p, s: np.stack([embed(p.reshape(len(p), -1), s)] * 3, axis=1))
    assert result.d < 0.01
    assert result.c < 0.01
    assert result.i > 0.98


def test_one_slot_that_knows_all_is_complete_but_not_disentangled() -> None:
    def build(p: np.ndarray, s: int) -> np.ndarray:
        return np.stack([embed(p.reshape(len(p), -1), s), *random_slots(2, len(p), s)], axis=1)

    result = measure(build)
    assert result.d < 0.01
    assert result.c > 0.99
    assert result.i == pytest.approx(1 / 3, abs=0.02)  # a slot speaks for one entity only


def test_random_slots_know_nothing() -> None:
    result = measure(lambda p, s: np.stack(random_slots(3, len(p), s), axis=1))
    assert max(result.d, result.c, result.i) < 0.02


def test_d_and_c_equal_an_independent_computation() -> None:
    rng = np.random.default_rng(7)
    mixing = rng.random((4, 3))

    def build(p: np.ndarray, s: int) -> np.ndarray:
        noisy = [p * m[None, :, None] + 0.1 * np.random.default_rng(s).normal(size=p.shape) for m in mixing]
        return np.stack([embed(x.sum(axis=1), s) for x in noisy], axis=1)

    result = measure(build)
    r = result.importance
    assert (r > 0).sum() > 6
    weights = r.sum(axis=1) / r.sum()
    assert r.any(axis=0).all()
    assert r.any(axis=1).all()
    assert result.d == pytest.approx(float(weights @ (1 - np.asarray(entropy(r, base=3, axis=1)))))
    assert result.c == pytest.approx(float(np.mean(1 - np.asarray(entropy(r, base=4, axis=0)))))


def test_absent_entities_are_left_out_sample_by_sample() -> None:
    train, test = positions(400, 2, 1), positions(400, 2, 2)
    slots = [np.stack([embed(p[:, a], s) for a in range(2)], axis=1) for s, p in ((3, train), (4, test))]
    for p, s, seed in ((train, slots[0], 5), (test, slots[1], 6)):
        away = np.random.default_rng(seed).random(400) < 0.5
        p[away, 1] = np.nan
        s[away, 1] = 1e3  # would ruin the probe if these samples were used
    result = dci(slots[0], train, slots[1], test)
    assert (result.d, result.c, result.i) == pytest.approx((1, 1, 1), abs=0.01)


def test_entities_that_cannot_be_probed_are_left_out_altogether() -> None:
    train, test = positions(400, 4, 1), positions(400, 4, 2)
    slots = [np.stack([embed(p[:, a], s) for a in range(2)], axis=1) for s, p in ((3, train), (4, test))]
    for p in (train, test):
        p[:, 2] = 0.5  # never moves
        p[MIN_SAMPLES - 1 :, 3] = np.nan  # hardly ever in view
    result = dci(slots[0], train, slots[1], test)
    assert result.entities == (0, 1)
    assert result.importance.shape == (2, 4)
    assert not result.importance[:, 2:].any()
    assert (result.d, result.c, result.i) == pytest.approx((1, 1, 1), abs=0.01)
    train[:] = 0.5
    with pytest.raises(DataError, match="none of 4 entities"):
        dci(slots[0], train, slots[1], test)


def test_fewer_slots_than_agents() -> None:
    result = measure(lambda p, s: np.stack([embed(p[:, a], s) for a in range(2)], axis=1), agents=3)
    assert result.d == pytest.approx(1, abs=0.01)
    assert result.c == pytest.approx(2 / 3, abs=0.01)  # nobody knows of the third
    assert result.i == pytest.approx(2 / 3, abs=0.01)
    assert set(result.position_r2) == {0, 1}


def test_one_slot_and_one_agent_are_defined() -> None:
    one_agent = measure(lambda p, s: np.stack([embed(p[:, 0], s)] * 2, axis=1), agents=1)
    assert one_agent.d == 1
    assert one_agent.c < 0.01
    assert one_agent.i > 0.98
    one_slot = measure(lambda p, s: embed(p.reshape(len(p), -1), s)[:, None], agents=3)
    assert one_slot.d < 0.01
    assert one_slot.c == 1
    assert one_slot.i == pytest.approx(1 / 3, abs=0.01)
    neither = measure(lambda p, s: np.stack(random_slots(1, len(p), s), axis=1), agents=1)
    assert (neither.d, neither.c, neither.i) == pytest.approx((0, 0, 0), abs=0.02)


@pytest.mark.parametrize("seed", range(12))
def test_all_numbers_stay_in_the_unit_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, agents, width, samples = rng.integers(1, 6), rng.integers(1, 6), rng.integers(1, 40), rng.integers(20, 80)
    splits = []
    for _ in range(2):
        p = rng.random((samples, agents, 2))
        s = rng.normal(size=(samples, slots, width)) * 10.0 ** rng.integers(-9, 9, size=width)
        s[..., 0] += p[:, :1, 0]
        s[..., -1] = 1.0
        p[rng.random((samples, agents)) < 0.2] = np.nan
        splits += [s, p]
    splits[0][:, 0] = splits[0][0, 0]  # a slot that is constant on train only
    result = dci(*splits)
    numbers = [*result.metrics.values(), *result.importance.ravel()]
    assert np.isfinite(numbers).all()
    assert min(numbers) >= 0
    assert max(numbers) <= 1


def test_shapes_and_numbers_that_make_no_sense_are_refused() -> None:
    p = positions(40, 2, 0)
    s = np.random.default_rng(0).normal(size=(40, 3, 4))
    with pytest.raises(DataError, match="do not belong together"):
        dci(s[:30], p, s, p)
    with pytest.raises(DataError, match="train has slots"):
        dci(s, p, s[:, :2], p)
    with pytest.raises(TrainingFailed, match="not finite"):
        dci(s * np.nan, p, s, p)


def test_spread_over_episodes() -> None:
    """One episode in four is noisy: how many of these a resample holds makes the spread."""
    train, test = positions(400, 2, 1), positions(400, 2, 2)
    episodes = np.repeat(np.arange(20), 20)
    slots = [np.stack([embed(p[:, a], s) for a in range(2)], axis=1) for s, p in ((3, train), (4, test))]
    slots[1][episodes % 4 == 0] += np.random.default_rng(5).normal(scale=0.2, size=(100, 2, 12))
    result = dci(slots[0], train, slots[1], test, Bootstrap(episodes.tolist(), seed=0))
    assert {key: estimate.mean for key, estimate in result.estimates.items()} == pytest.approx(result.metrics)
    i = result.estimates["dci/i"]
    assert i.n == 20
    assert i.se is not None
    assert i.low is not None
    assert i.high is not None
    assert 0.003 < i.se < 0.05
    assert i.low < result.i < i.high
    plain = dci(slots[0], train, slots[1], test)
    assert plain.estimates == {}
    assert plain.metrics == result.metrics
