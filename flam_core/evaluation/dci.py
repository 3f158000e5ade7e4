"""Factor-agent correspondence: does each slot stand for one entity, and each entity for one slot?

Linear probes from slots to the entities' true positions give an importance matrix, of which disentanglement (D),
completeness (C) and informativeness (I) are read (Eastwood and Williams 2018; flam-spec: protocol).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.stats import Bootstrap, Estimate

RIDGE = 1e-2
"""Penalty of the probes, in units of a standardised feature's variance. Slots are wide and clips few."""
CHANCE_R2 = 0.02
"""A held-out R^2 below this counts as no importance: chance gives as much, and D and C would be read off noise."""
WITHIN = 1 / 16
"""Share of the frame's side: half a cell on the usual grid of 8 x 8 cells."""
MIN_SAMPLES = 16
"""An entity that is in view in fewer frames, of either split, is not probed."""
MIN_SPREAD = 1e-3
"""An entity whose position has a smaller standard deviation (share of the frame's side) does not move: not probed."""


@dataclass(frozen=True, eq=False)
class DCIResult:
    """Correspondence of K slots and A entities; every number is in [0, 1].

    d, c, i, within: see `dci`. importance: float64 [K, A], zero for entities that were not probed.
    entities: the entities that were probed, in order. matching: pairs (slot, entity).
    """

    d: float
    c: float
    i: float
    within: float
    importance: np.ndarray
    entities: tuple[int, ...]
    matching: tuple[tuple[int, int], ...]
    position_r2: dict[int, float]
    """Held-out R^2, clipped to [0, 1], of the matched slot's probe, by entity; unmatched entities are absent."""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """`metrics` with their spread over test episodes, if these were given. The probes are not fitted anew."""

    @property
    def metrics(self) -> dict[str, float]:
        """As in docs/metrics.md."""
        values = {"dci/d": self.d, "dci/c": self.c, "dci/i": self.i, "dci/within": self.within}
        return values | {f"probe/position_r2@{a}": r2 for a, r2 in self.position_r2.items()}


def dci(
    slots_train: np.ndarray,
    positions_train: np.ndarray,
    slots_test: np.ndarray,
    positions_test: np.ndarray,
    bootstrap: Bootstrap | None = None,
) -> DCIResult:
    """Measure the correspondence of slots float [N, K, D] with positions float [N, A, 2] of entities.

    Positions are (x, y) in [0, 1] of the frame. A sample in which an entity's position is NaN (it is not in view) is
    left out for that entity. N may differ between train and test. bootstrap: of the test samples, for `estimates`.

    - A probe is a ridge regression from one slot to one entity's (x, y), fitted on train. Its R^2 is
      1 - squared error / squared deviation from the mean, both summed over x, y and samples.
    - Importance R[k, a] = the probe's R^2 on *test*, or 0 where that is below CHANCE_R2.
    - D: for each slot 1 - H(R[k, :] / sum) / log A, averaged with each slot's share of the total importance as weight.
      1: every informative slot knows of one entity only. 0: they know of all alike, or nothing is known.
    - C: for each entity 1 - H(R[:, a] / sum) / log K, averaged over entities (0 for one that no slot knows of).
      1: every entity is known to one slot only.
    - Matching: slots to entities, one to one, with the largest sum of *train* R^2 (Hungarian method).
    - I: the matched probe's accuracy, averaged over entities. *Accuracy is the probe's R^2 on test, clipped to [0, 1]*.
      An entity without a slot of its own (K < A) counts as 0: a slot speaks for one entity.
    - within: the same average for another accuracy: the share of test samples whose predicted x and y are both within
      WITHIN of the true ones, that is, in the right cell of an 8 x 8 grid.

    A and K in the logarithms are the probed entities and the slots. With one entity no slot can mix entities up, so
    D = 1 if anything is known at all; with one slot C = 1 likewise. D and C say nothing about how much is known: read
    them beside I.

    Raises DataError if the shapes disagree or no entity moves in view often enough to be probed (MIN_SAMPLES,
    MIN_SPREAD), TrainingFailed if a slot is not finite.
    """
    _check(slots_train, positions_train, slots_test, positions_test)
    slots, agents = slots_train.shape[1], positions_train.shape[1]
    seen = [np.isfinite(p.sum(axis=2)) for p in (positions_train, positions_test)]
    probed = tuple(
        a
        for a in range(agents)
        if _moves(positions_train[seen[0][:, a], a]) and _moves(positions_test[seen[1][:, a], a])
    )
    if not probed:
        raise DataError(
            f"none of {agents} entities is in view and moves in {MIN_SAMPLES} or more frames of both splits",
            fix="Give more probe clips (evaluation.probe_clips), or check the positions of the data set.",
        )
    train_r2 = np.zeros((slots, agents))
    sums = np.zeros((len(positions_test), slots, agents, 4))
    for a in probed:
        here, there = seen[0][:, a], seen[1][:, a]
        for k in range(slots):
            train_r2[k, a], sums[there, k, a] = _probe(
                slots_train[here, k], positions_train[here, a], slots_test[there, k], positions_test[there, a]
            )
    rows, columns = linear_sum_assignment(train_r2[:, list(probed)], maximize=True)
    matching = tuple((int(k), probed[c]) for k, c in zip(rows, columns, strict=True))
    found = _scores(sums.sum(axis=0)[None], probed, matching)
    names = ("dci/d", "dci/c", "dci/i", "dci/within", *(f"probe/position_r2@{a}" for _, a in _by_entity(matching)))
    estimates = {}
    if bootstrap is not None:
        draws = _scores(bootstrap.total(sums), probed, matching)
        estimates = {name: bootstrap.estimate(column) for name, column in zip(names, draws.T, strict=True)}
    d, c, i, within, *accuracy = (float(value) for value in found[0])
    return DCIResult(
        d=d,
        c=c,
        i=i,
        within=within,
        importance=_importance(sums.sum(axis=0)),
        entities=probed,
        matching=matching,
        position_r2={a: r2 for (_, a), r2 in zip(_by_entity(matching), accuracy, strict=True)},
        estimates=estimates,
    )


def _by_entity(matching: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted(matching, key=lambda pair: pair[1])


def _importance(sums: np.ndarray) -> np.ndarray:
    """R^2 on test [..., K, A], 0 below CHANCE_R2, from sums [..., K, A, 4] as `_probe` gives them."""
    error, deviation = sums[..., 0], sums[..., 1]
    r2 = 1 - np.divide(error, deviation, out=np.ones_like(error), where=deviation > 0)
    return np.where(r2 >= CHANCE_R2, r2, 0.0)


def _scores(sums: np.ndarray, probed: Sequence[int], matching: Sequence[tuple[int, int]]) -> np.ndarray:
    """D, C, I, within and the matched accuracies by entity [R, 4 + pairs], for sums [R, K, A, 4] of each resample."""
    importance = _importance(sums)
    pairs = _by_entity(matching)
    rows, columns = [k for k, _ in pairs], [a for _, a in pairs]
    of_probed = importance[..., list(probed)]
    share = of_probed.sum(axis=2) / np.maximum(of_probed.sum(axis=(1, 2)), 1e-12)[:, None]
    error, deviation, close, samples = np.moveaxis(sums[:, rows, columns], -1, 0)
    accuracy = 1 - np.divide(error, deviation, out=np.ones_like(error), where=deviation > 0)
    accuracy = accuracy.clip(0.0, 1.0)
    hits = np.divide(close, samples, out=np.zeros_like(close), where=samples > 0)
    scores = [
        (share * _purity(of_probed)).sum(axis=1).clip(0.0, 1.0),
        _purity(of_probed.swapaxes(1, 2)).mean(axis=1).clip(0.0, 1.0),
        accuracy.sum(axis=1) / len(probed),
        hits.sum(axis=1) / len(probed),
    ]
    return np.concatenate([np.stack(scores, axis=1), accuracy], axis=1)


def _check(
    slots_train: np.ndarray, positions_train: np.ndarray, slots_test: np.ndarray, positions_test: np.ndarray
) -> None:
    for split, slots, positions in (("train", slots_train, positions_train), ("test", slots_test, positions_test)):
        if slots.ndim != 3 or positions.ndim != 3 or positions.shape[2] != 2 or len(slots) != len(positions):
            raise DataError(
                f"{split} slots {slots.shape} and positions {positions.shape} do not belong together",
                fix="Give [N, K, D] and [N, A, 2].",
            )
        if not np.isfinite(slots).all():
            raise TrainingFailed(
                f"{split} slots are not finite", fix="The weights have diverged: use an older checkpoint."
            )
    if slots_train.shape[1:] != slots_test.shape[1:] or positions_train.shape[1] != positions_test.shape[1]:
        raise DataError(
            f"train has slots {slots_train.shape[1:]} and {positions_train.shape[1]} entities, test "
            f"{slots_test.shape[1:]} and {positions_test.shape[1]}",
            fix="Both splits must come from one model and one data set.",
        )


def _moves(positions: np.ndarray) -> bool:
    """Whether positions [n, 2] are enough, and spread enough, for a probe to be told from a constant."""
    return len(positions) >= MIN_SAMPLES and float(np.sqrt(positions.var(axis=0).sum())) >= MIN_SPREAD


def _probe(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> tuple[float, np.ndarray]:
    """A ridge regression from x [n, D] to y [n, 2]: R^2 on train, and of each test sample [m, 4] the squared error, the
    squared deviation from the test mean, whether it is WITHIN, and 1."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # A feature that is (almost) constant says nothing; divided by its deviation it would be blown-up rounding noise.
    scale = np.where(scale > 1e-6, scale, np.inf)
    x, x_test = (x - mean).astype(np.float64) / scale, (x_test - mean).astype(np.float64) / scale
    centre = y.mean(axis=0, dtype=np.float64)
    gram = x.T @ x / len(x) + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - centre) / len(x))
    fitted, predicted = x @ weights + centre, x_test @ weights + centre
    deviation = np.square(y_test - y_test.mean(axis=0)).sum(axis=1)
    close = (np.abs(predicted - y_test) <= WITHIN).all(axis=1)
    squared = np.square(predicted - y_test).sum(axis=1)
    return _r2(fitted, y), np.stack([squared, deviation, close, np.ones(len(y_test))], axis=1)


def _r2(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Explained share of the variance of truth [n, 2], x and y pooled; negative if worse than the mean."""
    return float(1 - np.square(truth - predicted).sum() / np.square(truth - truth.mean(axis=0)).sum())


def _purity(weights: np.ndarray) -> np.ndarray:
    """1 - normalised entropy [...] of the last axis of weights [..., m] >= 0; 0 where all are zero."""
    total = weights.sum(axis=-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return np.where(total[..., 0] > 0, 1 - entropy / np.log(max(weights.shape[-1], 2)), 0.0)
