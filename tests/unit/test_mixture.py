"""Several data sets in one order: the shares of a batch, and the same guarantees for each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flam_core.data.mixture import Mixture, shares
from flam_core.data.order import rank_slice
from flam_core.errors import SettingsError
from tests.unit.test_order import MANY, Layout, order

OTHER: Layout = [[[9, 9, 9], [20]], [[14, 3]]]


def mixture(first: int, second: int, seed: int = 0) -> Mixture:
    return Mixture([order(MANY, batch=first, seed=seed), order(OTHER, batch=second, seed=seed, source=1)])


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32), st.integers(0, 30))
def test_each_batch_holds_the_next_batch_of_every_data_set(first: int, second: int, seed: int, n: int) -> None:
    of = mixture(first, second, seed)
    batch = of.batch(n)
    for source, one in enumerate(of.orders):
        assert [window for window in batch if window.clip.source == source] == one.batch(n)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 9))
def test_ranks_get_their_part_of_the_batch(first: int, second: int, world: int, n: int) -> None:
    of = mixture(first, second)
    parts = [of.part(n, rank_slice(of.batch_size, rank, world)) for rank in range(world)]
    assert [window for part in parts for window in part] == of.batch(n)


def test_a_rank_gets_of_every_data_set() -> None:
    of = mixture(6, 2)
    for rank in range(2):
        part = of.part(3, rank_slice(8, rank, 2))
        assert [sum(w.clip.source == source for w in part) for source in (0, 1)] == [3, 1]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 300))
def test_shares_add_up_and_are_within_one_of_exact(weights: list[float], batch: int) -> None:
    exact = [weight / sum(weights) * batch for weight in weights]
    try:
        found = shares(weights, batch)
    except SettingsError:
        assert min(exact) < 1
        return
    assert sum(found) == batch
    assert all(abs(a - b) < 1 for a, b in zip(found, exact, strict=True))


def test_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="above 0"):
        shares([1, 0], 8)
    with pytest.raises(SettingsError, match=r"weight 0\.01"):
        shares([1, 0.01], 8)
