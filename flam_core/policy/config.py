"""Settings of policies: the network, its training and its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flam_core.errors import SettingsError


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy is cloned and played; the same for all that are compared."""

    channels: tuple[int, ...] = (16, 32, 32)
    """Width of each IMPALA stage, which halves the frame."""
    hidden: int = 256
    """Width of the layer between the last stage and the actions."""
    stack: int = 1
    """Frames that the policy sees: the newest and those before it. One is enough where a picture says all there is to
    know; two show which way things move, and also what the expert did last, which a policy is quick to repeat."""
    steps: int = 1500
    """Gradient steps of each policy, however many labels it has."""
    looks: int = 15
    """How often in these steps a policy is tried on a tenth of its true labels, which it does not learn from; the one
    that did best is taken. A thousand labels are learnt by heart in far fewer steps than a million. 0: the last one."""
    batch: int = 64
    """Frames of a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's, after a short warm-up and before a cosine to zero."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    pseudo: Literal["soft", "hard"] = "soft"
    """What a frame without a label is given: the decoder's probabilities, or the one action that it thinks most
    probable. Soft labels say little where latents cannot tell, as of a blocked move, and hard ones something false."""
    greedy: bool = False
    """Play the most probable action instead of drawing one by its probability."""
    decoder_hidden: int = 64
    """Width of the action decoder's hidden layer."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the policy's forward pass; auto takes bf16 where the hardware is fast at it."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise SettingsError(f"policy.channels = {self.channels}", fix="Give one positive width a stage.")
        for name in ("hidden", "stack", "steps", "batch", "decoder_hidden"):
            if getattr(self, name) < 1:
                raise SettingsError(f"policy.{name} = {getattr(self, name)}", fix="It must be at least 1.")
        if self.looks < 0:
            raise SettingsError(f"policy.looks = {self.looks}", fix="Use 0 or more.")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise SettingsError(
                f"policy.learning_rate = {self.learning_rate}, policy.weight_decay = {self.weight_decay}",
                fix="The first must be above 0, the second not below.",
            )
