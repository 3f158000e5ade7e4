"""Settings of what is measured on held-out episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from flam_core.errors import SettingsError

Measured = Literal["rollout", "horizon", "dci", "action_probe", "leakage", "slots", "usage", "lpips", "fvd"]
"""Names of what can be measured on held-out episodes (docs/metrics.md)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out episodes."""

    measures: tuple[Measured, ...] = get_args(Measured)
    """What is measured at the end. The report is built on "rollout", so it must be among them."""
    during: tuple[tuple[Measured, int], ...] = ()
    """What is measured while FLAM trains (stage 2), each with the number of steps from one time to the next: `rollout
    500 dci 1000`."""
    during_clips: int = 16
    """Clips, of each kind, that are measured while training."""

    clips: int = 64
    """Clips of the test split that are rolled out."""
    horizon: int = 10
    """Steps of a rollout."""
    context: int = 1
    """True frames that a rollout starts from."""
    rollout: Literal["slots", "frames"] = "slots"
    """What is fed back: predicted slots, or slots of the predicted frames, which the tokenizer has cleaned."""
    probe_clips: int = 128
    """Clips of the train split and of the test split that the linear probes (DCI, true actions) use."""
    long_clips: int = 16
    """Clips of the test split whose long rollout is measured."""
    long_horizon: int = 50
    """Steps of the long rollout; fewer where clips are shorter."""
    replacement: Literal["other", "zero", "prior"] = "other"
    """By what one slot's latent action is replaced to see what changes: another clip's of the same slot, zero, or one
    drawn from the fixed prior."""
    lpips_weights: str | None = None
    """A safetensors file with the weights of LPIPS (docs/metrics.md). Without one, LPIPS is not measured."""
    lpips_sha256: str | None = None
    """SHA-256 of that file, in hex."""
    fvd_weights: str | None = None
    """A safetensors file with the weights of I3D (docs/metrics.md). Without one, FVD is not measured."""
    fvd_sha256: str | None = None
    """SHA-256 of that file, in hex."""

    def __post_init__(self) -> None:
        for name in ("clips", "horizon", "context", "probe_clips", "during_clips", "long_clips", "long_horizon"):
            if getattr(self, name) < 1:
                raise SettingsError(f"evaluation.{name} = {getattr(self, name)}", fix="It must be at least 1.")
        if "rollout" not in self.measures:
            raise SettingsError(
                f"evaluation.measures = {self.measures}", fix='Add "rollout": the report is built on it.'
            )
        if odd := [f"{name} {steps}" for name, steps in self.during if steps < 1]:
            raise SettingsError(f"evaluation.during has {', '.join(odd)}", fix="Steps must be at least 1.")
        names = [name for name, _ in self.during]
        if len(set(names)) < len(names):
            raise SettingsError(f"evaluation.during names one twice: {' '.join(names)}", fix="Give each one cadence.")
        for name in ("lpips", "fvd"):
            if (getattr(self, f"{name}_weights") is None) != (getattr(self, f"{name}_sha256") is None):
                raise SettingsError(
                    f"evaluation.{name}_weights and evaluation.{name}_sha256 belong together, and one is missing",
                    fix="Give both, or neither.",
                )

    def due(self, step: int) -> tuple[Measured, ...]:
        """What to measure after so many steps of stage 2 (`during`)."""
        return tuple(name for name, cadence in self.during if step > 0 and step % cadence == 0)
