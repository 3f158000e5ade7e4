"""From latent actions to true ones: which slot is the player's, and a small network that says what it did."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from flam_core.errors import DataError
from flam_core.policy.config import PolicyConfig

HELD_OUT = 0.2
"""Share of the labels that slots are compared on."""
LEAST_LABELS = 50
_BATCH, _STEPS, _MOST_EPOCHS = 64, 2_000, 100


@dataclass(frozen=True, eq=False)
class ActionDecoder:
    """slot: whose latent action tells the player's. accuracy: of each slot's decoder on the held-out labels."""

    slot: int
    accuracy: tuple[float, ...]
    choices: int
    _network: Any

    def probabilities(self, latents: np.ndarray) -> np.ndarray:
        """Of each action, float32 [n, choices], from latent actions float32 [n, K, A]."""
        return _probabilities(self._network, latents[:, self.slot], self.choices)


def fit_decoder(
    latents: np.ndarray, actions: np.ndarray, choices: int, config: PolicyConfig, seed: int
) -> ActionDecoder:
    """Find the player's slot among latent actions float32 [n, K, A] by true actions int64 [n], and fit its decoder.

    A decoder for each slot is fitted on most of the labels; the slot is the one whose decoder gives the true actions
    of the rest the highest likelihood. Its decoder is then fitted anew on all labels. Raises DataError for fewer than
    `LEAST_LABELS` labels, or labels that are all alike.
    """
    if len(actions) < LEAST_LABELS or len(np.unique(actions)) < 2:
        raise DataError(
            f"{len(actions)} labels of {len(np.unique(actions))} different actions",
            fix=f"A decoder needs at least {LEAST_LABELS} labels and two actions.",
        )
    order = np.random.default_rng((seed, 0)).permutation(len(actions))
    test, train = np.split(order, [round(HELD_OUT * len(order))])
    scores, accuracy = [], []
    for slot in range(latents.shape[1]):
        network = _fit(latents[train, slot], actions[train], config, seed)
        guessed = _probabilities(network, latents[test, slot], choices)
        scores.append(float(np.log(guessed[np.arange(len(test)), actions[test]].clip(1e-6)).mean()))
        accuracy.append(float((guessed.argmax(axis=1) == actions[test]).mean()))
    slot = int(np.argmax(scores))
    return ActionDecoder(slot, tuple(accuracy), choices, _fit(latents[:, slot], actions, config, seed))


def _fit(latents: np.ndarray, actions: np.ndarray, config: PolicyConfig, seed: int) -> Any:
    """A perceptron from latent actions [n, A] to classes."""
    from sklearn.exceptions import ConvergenceWarning  # a second, which no other start need wait for
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier(
        (config.decoder_hidden,),
        alpha=1e-3,
        batch_size=min(_BATCH, len(actions)),  # pyright: ignore[reportArgumentType]
        learning_rate_init=3e-3,
        max_iter=_epochs(len(actions)),
        n_iter_no_change=_epochs(len(actions)),
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of steps is meant, and ends every fit
        return make_pipeline(StandardScaler(), network).fit(latents.astype(np.float64), actions)


def _epochs(labels: int) -> int:
    """That make about `_STEPS` steps, but show no label more than `_MOST_EPOCHS` times."""
    return max(1, min(_MOST_EPOCHS, _STEPS * _BATCH // labels))


def _probabilities(network: Any, latents: np.ndarray, choices: int) -> np.ndarray:
    """float32 [n, choices]; 0 for actions that no label showed."""
    found = np.zeros((len(latents), choices), dtype=np.float32)
    found[:, network.classes_] = network.predict_proba(latents.astype(np.float64))
    return found
