"""What slots and latent actions stand for: DCI and the action probe of a model's probe clips, and who is whose."""

from __future__ import annotations

import numpy as np

from flam_core.evaluation.action_probe import ActionProbe, Transitions, probe_actions
from flam_core.evaluation.context import Context, Observed
from flam_core.evaluation.dci import DCIResult, dci
from flam_core.evaluation.measure import Findings, Measure


def correspondence(context: Context) -> DCIResult:
    """Of slots and entities. Raises DataError without ground-truth positions of entities that move."""
    train, test = context.probes("train", "positions"), context.probes("test", "positions")
    samples = []
    for seen in (train, test):
        assert seen.positions is not None  # `probes` has seen to it
        samples += [seen.slots.flatten(0, 1).numpy(), seen.positions.reshape(-1, *seen.positions.shape[2:])]
    clusters = np.repeat(test.clusters, test.frames.shape[1]).tolist()
    return dci(*samples, bootstrap=context.bootstrap(clusters))


def action_probe(context: Context) -> ActionProbe:
    """Of latent actions and what entities were told to do. Raises DataError without true actions that differ."""
    train, test = context.probes("train", "actions"), context.probes("test", "actions")
    clusters = np.repeat(test.clusters, test.actions.shape[1]).tolist()
    return probe_actions(_transitions(train), _transitions(test), context.bootstrap(clusters))


def entity_of(context: Context) -> dict[int, int]:
    """The entity that each latent action is for, as far as it is for one: that of its slot, or else of its probe.

    Raises DataError without the ground truth that tells.
    """
    if context.model.has_slots:
        return dict(context.shared(correspondence).matching)
    return dict(context.shared(action_probe).matching)


def _transitions(seen: Observed) -> Transitions:
    assert seen.true_actions is not None  # `probes` has seen to it
    steps = None if seen.positions is None else np.diff(seen.positions, axis=1).reshape(-1, *seen.positions.shape[2:])
    return Transitions(
        latent=seen.actions.flatten(0, 1).numpy(),
        state=seen.slots[:, :-1].flatten(0, 1).numpy(),
        told=seen.true_actions[:, :-1].reshape(-1, *seen.true_actions.shape[2:]),
        step=steps,
    )


DCI = Measure("dci", "DCI", ("slots", "positions"), lambda context: Findings(context.shared(correspondence).estimates))
ACTION_PROBE = Measure(
    "action_probe",
    "action probe",
    ("latent actions", "actions"),
    lambda context: Findings(context.shared(action_probe).estimates),
)
