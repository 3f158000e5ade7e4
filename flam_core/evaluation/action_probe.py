"""Does a slot's latent action tell what its entity was told to do, and nothing of the others?

Linear probes from each latent action, and from the state alone, to each entity's true action; fitted on train clips,
scored on test clips. Whole numbers are classes (multinomial logistic regression, scored by accuracy); anything else is
a value (ridge regression, scored by R^2, which is clipped to [0, 1]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression

from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.dci import MIN_SAMPLES, RIDGE
from flam_core.evaluation.stats import Bootstrap, Estimate

MAX_CLASSES = 32
"""Whole numbers with more different values than this are treated as values."""
MOVES = 0.1
"""An action moves an entity if it does so in more than this share of its train transitions."""
MIN_STEP = 1e-3
"""Share of the frame's side: less than this is no movement."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """n transitions of a split.

    latent: float32 [n, M, A]. state: float32 [n, K, D] (K = M, or 1: one state for all) of the frame that they start
    from. told: float32 [n, E, S], what each entity was told to do, NaN where that is not known. step: float32
    [n, E, 2], by how much it moved, NaN where it is not in view; None without positions.
    """

    latent: np.ndarray
    state: np.ndarray
    told: np.ndarray
    step: np.ndarray | None


@dataclass(frozen=True, eq=False)
class ActionProbe:
    """matching: pairs (latent action, entity). estimates: as in docs/metrics.md."""

    matching: tuple[tuple[int, int], ...]
    estimates: Mapping[str, Estimate]


def probe_actions(train: Transitions, test: Transitions, bootstrap: Bootstrap) -> ActionProbe:
    """Probe every latent action for every entity, and match them one to one by the score on train.

    bootstrap: of the test transitions. The state-only probes are as wide as the latent action's: the state is first
    projected on its leading A principal components (of train). An entity is probed if MIN_SAMPLES of its actions are
    known in both splits and it was told more than one thing.

    Raises DataError if no entity can be probed, TrainingFailed if a latent action is not finite.
    """
    for split in (train, test):
        if not (np.isfinite(split.latent).all() and np.isfinite(split.state).all()):
            raise TrainingFailed("latent actions are not finite", fix="The weights have diverged: use an older one.")
    if train.told.shape[1:] != test.told.shape[1:]:
        raise DataError(
            f"train has actions {train.told.shape[1:]} a transition and test {test.told.shape[1:]}",
            fix="Both splits must come from one data set.",
        )
    entities = [e for e in range(train.told.shape[1]) if _told_apart(train, e) and _told_apart(test, e)]
    if not entities:
        raise DataError(
            f"none of {train.told.shape[1]} entities has {MIN_SAMPLES} known and differing true actions in both splits",
            fix="Give more probe clips (evaluation.probe_clips).",
        )
    discrete = _discrete(np.concatenate([train.told[:, entities], test.told[:, entities]]))
    latents, width = train.latent.shape[1:]
    fitted: dict[tuple[int, int], _Scores] = {}
    from_state: dict[tuple[int, int], _Scores] = {}
    for k in range(train.state.shape[1]):
        states = _principal(train.state[:, k], test.state[:, k], width)
        for e in entities:
            from_state[k, e] = _score(*states, *_targets(train, test, e), discrete)
    for m in range(latents):
        for e in entities:
            fitted[m, e] = _score(train.latent[:, m], test.latent[:, m], *_targets(train, test, e), discrete)
            from_state[m, e] = from_state[m if train.state.shape[1] > 1 else 0, e]
    on_train = np.array([[fitted[m, e].on_train for e in entities] for m in range(latents)])
    rows, columns = linear_sum_assignment(on_train, maximize=True)
    matching = tuple(sorted(((int(m), entities[c]) for m, c in zip(rows, columns, strict=True)), key=lambda p: p[1]))
    others = [pair for pair in fitted if pair not in matching]
    name = "accuracy" if discrete else "r2"
    own = {pair: fitted[pair].draws(bootstrap) for pair in matching}
    of_state = {pair: from_state[pair].draws(bootstrap) for pair in {*matching, *others}}
    draws = {
        f"action_probe/{name}": _mean([own[pair] for pair in matching]),
        "action_probe/state_only": _mean([of_state[pair] for pair in matching]),
    }
    draws["action_probe/gain"] = draws[f"action_probe/{name}"] - draws["action_probe/state_only"]
    if others:
        draws["action_probe/others"] = _mean([fitted[pair].draws(bootstrap) for pair in others])
        gains = {pair: fitted[pair].draws(bootstrap) - of_state[pair] for pair in others}
        draws["action_probe/others_gain"] = _mean(list(gains.values()))
        draws["action_probe/others_gain_max"] = max(gains.values(), key=lambda one: one[0])
    draws |= {f"action_probe/{name}@{e}": own[m, e] for m, e in matching}
    if discrete and train.step is not None and test.step is not None:
        visible, by_state = [], []
        for m, e in matching:
            seen = (visible_actions(train, train, e), visible_actions(train, test, e))
            k = m if train.state.shape[1] > 1 else 0
            states = _principal(train.state[:, k], test.state[:, k], width)
            visible.append(_score(train.latent[:, m], test.latent[:, m], *seen, discrete=True).draws(bootstrap))
            by_state.append(_score(*states, *seen, discrete=True).draws(bootstrap))
        draws["action_probe/visible_accuracy"] = _mean(visible)
        draws["action_probe/visible_state_only"] = _mean(by_state)
        draws["action_probe/visible_gain"] = _mean(visible) - _mean(by_state)
    return ActionProbe(matching, {key: bootstrap.estimate(values) for key, values in draws.items()})


def visible_actions(train: Transitions, split: Transitions, entity: int) -> np.ndarray:
    """What can be seen of what an entity was told to do: classes float64 [n], NaN where it is not known.

    It is the told action, unless that is one that moves the entity (more than MOVES of the time, on train) and the
    entity stayed where it was: it was blocked, which looks like staying. So blocked transitions are of the class of the
    one action that never moves the entity, if there is just one, else of a class of their own, -1.
    """
    assert train.step is not None
    assert split.step is not None
    told, moved = train.told[:, entity, 0], _moved(train.step[:, entity])
    known = np.isfinite(told) & np.isfinite(moved)
    movers = [a for a in np.unique(told[known]) if moved[known & (told == a)].mean() > MOVES]
    still = [a for a in np.unique(told[known]) if a not in movers]
    told, moved = split.told[:, entity, 0].astype(np.float64), _moved(split.step[:, entity])
    blocked = np.isin(told, movers) & (moved == 0)
    seen = np.where(blocked, still[0] if len(still) == 1 else -1.0, told)
    return np.where(np.isfinite(moved), seen, np.nan)


def _moved(step: np.ndarray) -> np.ndarray:
    """1 where steps [n, 2] are a movement, 0 where not, NaN where not in view."""
    length = np.sqrt(np.square(step).sum(axis=1))
    return np.where(np.isfinite(length), (length > MIN_STEP).astype(np.float64), np.nan)


@dataclass(frozen=True, eq=False)
class _Scores:
    """A probe's score on train, and on test the numerator and denominator [n] of each transition's part in it."""

    on_train: float
    top: np.ndarray
    bottom: np.ndarray
    discrete: bool

    def draws(self, bootstrap: Bootstrap) -> np.ndarray:
        """The score [1 + resamples] on test."""
        ratio = bootstrap.ratio(self.top, self.bottom)
        return ratio if self.discrete else (1 - ratio).clip(0.0, 1.0)


def _score(x: np.ndarray, x_test: np.ndarray, y: np.ndarray, y_test: np.ndarray, discrete: bool) -> _Scores:
    """Fit on x [n, A] and y [n] (classes) or [n, S] (values), score on test; NaN in y: not known, left out."""
    known, known_test = (np.isfinite(v.reshape(len(v), -1)).all(axis=1) for v in (y, y_test))
    mean, scale = x[known].mean(axis=0), x[known].std(axis=0)
    scale = np.where(scale > 1e-6, scale, np.inf)  # what is constant says nothing
    x, x_test = ((v - mean).astype(np.float64) / scale for v in (x, x_test))
    top, bottom = np.zeros(len(y_test)), np.zeros(len(y_test))
    if discrete:
        classes = np.unique(y[known])
        if len(classes) > 1:
            model = LogisticRegression(max_iter=300, tol=1e-3).fit(x[known], y[known])
            fitted, predicted = model.predict(x[known]), model.predict(x_test)
        else:
            fitted, predicted = np.full(known.sum(), classes[0]), np.full(len(y_test), classes[0])
        top[known_test] = predicted[known_test] == y_test[known_test]
        bottom[known_test] = 1
        return _Scores(float((fitted == y[known]).mean()), top, bottom, discrete)
    centre = y[known].mean(axis=0, dtype=np.float64)
    gram = x[known].T @ x[known] / known.sum() + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[known].T @ (y[known] - centre) / known.sum())
    residual = np.square(x[known] @ weights + centre - y[known]).sum() / np.square(y[known] - centre).sum()
    truth = y_test[known_test].astype(np.float64)
    top[known_test] = np.square(x_test[known_test] @ weights + centre - truth).sum(axis=1)
    bottom[known_test] = np.square(truth - truth.mean(axis=0)).sum(axis=1)
    return _Scores(float(1 - residual), top, bottom, discrete)


def _told_apart(split: Transitions, entity: int) -> bool:
    told = split.told[:, entity]
    known = told[np.isfinite(told).all(axis=1)]
    return len(known) >= MIN_SAMPLES and bool((known != known[0]).any())


def _targets(train: Transitions, test: Transitions, entity: int) -> tuple[np.ndarray, np.ndarray]:
    """What an entity was told [n, S], or [n] where that is one number."""
    pair = (train.told[:, entity], test.told[:, entity])
    return (pair[0][:, 0], pair[1][:, 0]) if train.told.shape[2] == 1 else pair


def _discrete(told: np.ndarray) -> bool:
    values = told[np.isfinite(told)]
    return told.shape[2] == 1 and bool((values == values.round()).all()) and len(np.unique(values)) <= MAX_CLASSES


def _principal(x: np.ndarray, x_test: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """x [n, D] and x_test on the leading `width` principal components of x, or on all if there are fewer."""
    mean = x.mean(axis=0, dtype=np.float64)
    _, directions = np.linalg.eigh(np.cov(x - mean, rowvar=False).reshape(x.shape[1], x.shape[1]))
    leading = directions[:, ::-1][:, :width]
    return (x - mean) @ leading, (x_test - mean) @ leading


def _mean(parts: list[np.ndarray]) -> np.ndarray:
    return np.mean(parts, axis=0)
