"""Who becomes champion: a decision by numbers that were measured for both on the same frozen clips.

Nothing here speaks to MLflow: evaluations go in, a decision comes out.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flam_core.errors import SettingsError
from flam_core.evaluation.evaluate import Evaluation
from flam_core.evaluation.paired import psnr_gain
from flam_core.evaluation.stats import Estimate
from flam_core.model import Flam

LATENCY = "latency_ms"
"""Of one step of a rollout of one clip: latent action in, picture out."""
_LATENCY_STEPS = 10
_LATENCY_TRIES = 5


@dataclass(frozen=True)
class Margins:
    """By how much a challenger may be worse than the champion beside the main metric."""

    dci: float = 0.02
    """Of DCI's informativeness."""
    leakage: float = 0.02
    """Of the share of the change that lies outside an entity."""
    usage: float = 0.1
    """Of the share of codes, or of latent dimensions, that are in use."""
    long_rollout_db: float = 0.5
    """Of the PSNR at the end of the long rollout."""
    latency_share: float = 0.2
    """Of the time that a step takes, as a share of the champion's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise SettingsError(f"margins.{name} = {value}", fix="It must be 0 or more.")


@dataclass(frozen=True, eq=False)
class Measured:
    """A version, and what was measured of it."""

    version: str
    evaluation: Evaluation
    latency_ms: float

    def metric(self, key: str) -> float | None:
        """None if it could not be measured."""
        return self.latency_ms if key == LATENCY else self.evaluation.metrics.get(key)


@dataclass(frozen=True)
class Guard:
    """Something that must not get worse by more than its margin."""

    metric: str
    challenger: float | None
    champion: float | None
    margin: float
    """In the metric's own unit."""
    worse: float | None
    """By how much the challenger is worse; below 0 it is better. None if the champion has no such number."""
    passed: bool


@dataclass(frozen=True)
class Decision:
    """Whether a challenger becomes champion, and why."""

    promoted: bool
    why: str
    challenger: str
    """Its version."""
    champion: str | None
    """The champion's version; None if there was none."""
    metric: str
    """The main metric."""
    gain: Estimate
    """Of the challenger over the champion; without one, over repeating the last known frame."""
    guards: tuple[Guard, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def decide(challenger: Measured, champion: Measured | None, margins: Margins, seed: int) -> Decision:
    """A challenger wins if the 95 % interval of its gain lies above 0 and every guard holds.

    Both must have been measured on the same clips. A number that the data do not allow is no guard; one that the
    champion has and the challenger lacks is a guard that fails.
    """
    own = challenger.evaluation.rollouts
    against = own if champion is None else champion.evaluation.rollouts
    gain = psnr_gain(own, against, seed, other_source="copy" if champion is None else "rollout")
    guards = () if champion is None else _guards(challenger, champion, margins, own.horizon)
    failed = [guard.metric for guard in guards if not guard.passed]
    if gain.low is None:
        why = "there is one episode alone, which says nothing of the spread: more held-out episodes are needed"
    elif gain.low <= 0:
        other = "repeating the last known frame" if champion is None else f"version {champion.version}"
        why = (
            f"it is not shown to be better than {other}: {gain.mean:+.2f} dB, 95 % {gain.low:+.2f} to {gain.high:+.2f}"
        )
    elif failed:
        why = f"it is better, but worse than its margin in {', '.join(failed)}"
    else:
        why = f"it is better by {gain.mean:.2f} dB, 95 % {gain.low:+.2f} to {gain.high:+.2f}, and every guard holds"
    promoted = gain.low is not None and gain.low > 0 and not failed
    metric = f"rollout/psnr@{own.horizon}"
    previous = None if champion is None else champion.version
    return Decision(promoted, why, challenger.version, previous, metric, gain, guards)


def _guards(challenger: Measured, champion: Measured, margins: Margins, horizon: int) -> tuple[Guard, ...]:
    long_steps = [int(key.partition("@")[2]) for key in champion.evaluation.metrics if key.startswith("horizon/psnr@")]
    last = max(long_steps, default=horizon)
    return (
        _guard("dci/i", challenger, champion, margins.dci, higher_is_better=True),
        _guard("leakage", challenger, champion, margins.leakage, higher_is_better=False),
        _guard("actions/usage", challenger, champion, margins.usage, higher_is_better=True),
        _guard(f"horizon/psnr@{last}", challenger, champion, margins.long_rollout_db, higher_is_better=True),
        _guard(LATENCY, challenger, champion, margins.latency_share * champion.latency_ms, higher_is_better=False),
    )


def _guard(metric: str, challenger: Measured, champion: Measured, margin: float, *, higher_is_better: bool) -> Guard:
    own, other = challenger.metric(metric), champion.metric(metric)
    if other is None:
        return Guard(metric, own, None, margin, None, passed=True)
    if own is None:
        return Guard(metric, None, other, margin, None, passed=False)
    worse = other - own if higher_is_better else own - other
    return Guard(metric, own, other, margin, worse, passed=worse <= margin)


@torch.inference_mode()
def latency_ms(model: Flam) -> float:
    """Milliseconds of one step of a rollout of one clip on the model's device: the least of some tries."""
    size = model.tokenizer.config.frame_size
    device = next(model.parameters()).device
    frames = torch.zeros(1, 1, size, size, 3, dtype=torch.uint8, device=device)
    actions = torch.zeros(1, _LATENCY_STEPS, model.factors, model.dynamics.config.action_dim, device=device)
    took = []
    for _ in range(_LATENCY_TRIES):
        begun = time.perf_counter()
        model.rollout(frames, actions).cpu()
        took.append(time.perf_counter() - begun)
    return min(took) / _LATENCY_STEPS * 1000
