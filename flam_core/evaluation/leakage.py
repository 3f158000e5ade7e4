"""Intervention leakage: of what a latent action changes in the picture, the share that is not at its entity."""

from __future__ import annotations

import numpy as np

from flam_core.errors import DataError
from flam_core.evaluation.context import Context
from flam_core.evaluation.correspondence import entity_of
from flam_core.evaluation.interventions import Interventions, intervene
from flam_core.evaluation.measure import Findings, Measure
from flam_core.evaluation.stats import Bootstrap, Estimate

FLOOR = 1e-6
"""Mean squared change of a frame below which replacing has changed nothing: the two predictions agree to 60 dB."""


def _run(context: Context) -> Findings:
    trials = context.shared(intervene)
    bootstrap = context.bootstrap(trials.clusters)
    estimates: dict[str, Estimate] = {}
    notes = []
    try:
        entities = entity_of(context)
        if context.held_out.positions is None:
            raise DataError("the clips that are rolled out have no ground-truth positions", fix="Ingest ground truth.")
        estimates |= _of_entities(trials, bootstrap, entities)
    except DataError as error:
        notes.append(f"No leakage outside entities: {error.what}.")
    if trials.outside_mask is None:
        notes.append("No leakage outside masks: the model has no slots.")
    else:
        found = _of_slots(bootstrap, trials.outside_mask, trials.change)
        estimates |= found
        if not found:
            notes.append("No leakage outside masks: replacing latent actions changes nothing.")
    return Findings(estimates, notes=tuple(notes))


def _of_entities(trials: Interventions, bootstrap: Bootstrap, entities: dict[int, int]) -> dict[str, Estimate]:
    """`leakage`, pooled over latent actions, and that of each one's entity. Raises DataError if nothing changes."""
    draws = _share(bootstrap, trials.outside_entity, trials.change)
    if not np.isfinite(draws[0]):
        raise DataError(
            "replacing the latent action of an entity in view changes nothing", fix="Do the latent actions collapse?"
        )
    estimates = {"leakage": bootstrap.estimate(draws)}
    for m, entity in sorted(entities.items(), key=lambda pair: pair[1]):
        own = _share(bootstrap, trials.outside_entity[:, m], trials.change[:, m])
        if np.isfinite(own[0]):
            estimates[f"leakage@{entity}"] = bootstrap.estimate(own)
    return estimates


def _of_slots(bootstrap: Bootstrap, outside: np.ndarray, change: np.ndarray) -> dict[str, Estimate]:
    """`leakage/in_mask`, pooled over slots, and that of each slot whose latent action changes anything; outside,
    change: [R, M], as in `Interventions`. Nothing if no latent action does."""
    draws = {"leakage/in_mask": _share(bootstrap, outside, change)}
    draws |= {f"leakage/{m}/in_mask": _share(bootstrap, outside[:, m], change[:, m]) for m in range(change.shape[1])}
    return {key: bootstrap.estimate(one) for key, one in draws.items() if np.isfinite(one[0])}


def _share(bootstrap: Bootstrap, outside: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Share [1 + resamples] of the change that lies outside, pooled over the trials [R] or [R, M] that count."""
    counts = np.isfinite(outside) & (change > FLOOR)
    top, bottom = (np.where(counts, values, 0.0).reshape(len(change), -1).sum(axis=1) for values in (outside, change))
    return bootstrap.ratio(top, bottom)


LEAKAGE = Measure("leakage", "leakage", ("latent actions",), _run)
