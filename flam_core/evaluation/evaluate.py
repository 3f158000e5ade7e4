"""Everything that is measured on held-out clips, in one call: a registry of measures over one shared context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from flam_core.config_evaluation import EvaluationConfig, Measured
from flam_core.errors import DataError
from flam_core.evaluation.context import Context, HeldOutClip
from flam_core.evaluation.correspondence import ACTION_PROBE, DCI, correspondence
from flam_core.evaluation.dci import DCIResult
from flam_core.evaluation.horizon import HORIZON
from flam_core.evaluation.leakage import LEAKAGE
from flam_core.evaluation.measure import Findings, Measure
from flam_core.evaluation.perceptual import FVD, LPIPS
from flam_core.evaluation.rollout import ROLLOUT, RolloutResult, evaluate_rollouts
from flam_core.evaluation.slots import SLOTS
from flam_core.evaluation.stats import Estimate
from flam_core.evaluation.usage import USAGE
from flam_core.model.flam import Flam

MEASURES: tuple[Measure, ...] = (ROLLOUT, HORIZON, DCI, ACTION_PROBE, LEAKAGE, SLOTS, USAGE, LPIPS, FVD)
"""All there are, one for each name in `config.Measured`. They run in this order."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """metrics: as in docs/metrics.md. correspondence: None, with the reason in `notes`, if it could not be measured.

    notes: what is missing and why. estimates: the metrics that have a spread over episodes, with it.
    """

    metrics: dict[str, float]
    rollouts: RolloutResult
    correspondence: DCIResult | None
    notes: tuple[str, ...]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


def evaluate(
    model: Flam,
    clips: Sequence[HeldOutClip],
    probe_clips_train: Sequence[HeldOutClip],
    probe_clips_test: Sequence[HeldOutClip],
    config: EvaluationConfig,
    seed: int,
    long_clips: Sequence[HeldOutClip] = (),
) -> Evaluation:
    """Measure a model on the first `context + horizon` frames of held-out clips, by `config.measures`.

    The first `config.clips` clips that are long enough are rolled out; the first `config.probe_clips` of each probe
    split that are long enough and have the ground truth in question are probed. long_clips: for the horizon curve
    (`clips` by default, which are often cut to what the rest needs). The model runs on its own device in evaluation
    mode; the mode of each of its modules is restored.

    Raises DataError if no clip, or only one, is long enough, TrainingFailed if the model's numbers are not finite,
    SettingsError for weights of LPIPS or FVD that are not those that were meant.
    """
    context = Context(model, clips, probe_clips_train, probe_clips_test, config, seed, long_clips)
    with _evaluating(model):
        rollouts = context.shared(evaluate_rollouts)
        found = _run(context, config.measures)
        try:
            matched = context.shared(correspondence) if "dci" in config.measures and model.has_slots else None
        except DataError:
            matched = None  # the note is among those of the measures
    return Evaluation(found.metrics, rollouts, matched, found.notes, found.estimates)


def measure(
    model: Flam,
    clips: Sequence[HeldOutClip],
    probe_clips_train: Sequence[HeldOutClip],
    probe_clips_test: Sequence[HeldOutClip],
    config: EvaluationConfig,
    seed: int,
    names: Sequence[Measured],
    long_clips: Sequence[HeldOutClip] = (),
) -> Findings:
    """Run some measures alone, on at most `config.during_clips` clips of each kind: for a look while training.

    Arguments and errors as for `evaluate`, but that whatever the data do not allow is a note. Modes and random
    numbers are left as they were, so training goes on as if nothing had been measured.
    """
    small = {name: min(getattr(config, name), config.during_clips) for name in ("clips", "probe_clips", "long_clips")}
    context = Context(model, clips, probe_clips_train, probe_clips_test, replace(config, **small), seed, long_clips)
    with _evaluating(model):
        return _run(context, names)


def _run(context: Context, names: Sequence[Measured]) -> Findings:
    """The findings of the named measures, together."""
    estimates: dict[str, Estimate] = {}
    values: dict[str, float] = {}
    notes: list[str] = []
    for one in MEASURES:
        if one.name not in names:
            continue
        missing = next((reason for need in one.needs if (reason := context.lacks(need))), None)
        try:
            found = Findings(notes=(f"No {one.title}: {missing}.",)) if missing else one.run(context)
        except DataError as error:
            found = Findings(notes=(f"No {one.title}: {error.what}.",))
        estimates |= found.estimates
        values |= found.values
        notes += [note for note in found.notes if note not in notes]
    return Findings(estimates, values, tuple(notes))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode (a frozen tokenizer differs from the rest) and the state
    of the random numbers again."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
