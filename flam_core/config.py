"""Every setting of the method: frozen dataclasses, checked on construction, hashable, with a JSON round-trip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from flam_core.config_evaluation import EvaluationConfig
from flam_core.config_json import canonical_json, to_dict
from flam_core.config_model import ModelConfig, TokenizerConfig
from flam_core.errors import SettingsError

__all__ = ["Config", "LossConfig", "ModelConfig", "StageConfig", "TokenizerConfig"]


@dataclass(frozen=True)
class StageConfig:
    """One training stage: what a batch holds, how many steps, and the optimiser."""

    steps: int
    """Optimiser steps. With none in the second stage, the run gives a tokenizer alone (`--tokenizer_from` takes it)."""
    batch_clips: int
    """Clips of the global batch, whatever the number of workers."""
    clip_frames: int
    """Frames of a clip."""
    frame_skip: int = 1
    """Distance of these frames in the video: 2 takes every other one."""
    window_stride: int | None = None
    """Frames from one clip to the next in the same video; None: they touch, and no frame is in two."""
    learning_rate: float = 1e-4
    """Peak of the AdamW learning rate."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    warmup: int = 100
    """Steps of linear warm-up; a cosine to zero follows."""
    clip_norm: float = 1.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        if self.window_stride is not None and self.window_stride < 1:
            raise SettingsError(f"window_stride = {self.window_stride} in a stage", fix="It must be at least 1.")
        if self.steps < 0:
            raise SettingsError(f"steps = {self.steps} in a stage", fix="It must not be negative.")
        for name in ("batch_clips", "clip_frames", "frame_skip"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)} in a stage", fix="It must be at least 1.")
        if not (self.learning_rate > 0 and self.clip_norm > 0):  # so said, it also catches nan
            raise SettingsError("learning_rate and clip_norm must be above 0", fix="Check the stage's settings.")
        if self.warmup < 0 or self.weight_decay < 0:
            raise SettingsError("warmup and weight_decay must not be negative", fix="Check the stage's settings.")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the stage-2 loss."""

    beta: float = 2e-4
    """Weight of the KL, summed over slots and latent dimensions."""
    beta_warmup: tuple[float, float] = (0.0, 0.0)
    """Shares of the steps at which beta starts to rise from zero and at which it is reached."""
    codebook_warmup: float = 0.0
    """Share of the steps for which discrete latent actions are not quantised yet. Codes then start as clusters of what
    the dynamics have learnt to listen to; from random codes they may never begin to (docs/devlog.md)."""
    free_bits: float = 0.0
    """Nats of a slot's KL, on average over the batch (or the part that a rank takes at a time), that cost nothing."""
    bridge: float = 0.0
    """Weight of predicting the next features from the *true* next slots. It trains what slots carry without waiting
    for the dynamics to work; the paper has none."""
    slot_prediction: float = 0.0
    """Weight of the squared error between predicted and true next slots (whose gradient is stopped). It trains the
    dynamics without waiting for the aggregator; the paper has none."""
    motion: float = 0.1
    """With `model.motion_readout`: weight of what a linear map of latent actions says amiss of how slots move, in
    squared patches; the paper has none."""
    rollout_steps: int = 0
    """Steps of slot-space rollout that are trained beside the one-step prediction; 0 for none."""
    rollout_weight: float = 1.0
    """Weight of the rollout loss."""

    def __post_init__(self) -> None:
        start, end = self.beta_warmup
        if not 0 <= start <= end <= 1:
            raise SettingsError(f"loss.beta_warmup = {self.beta_warmup}", fix="Give 0 <= start <= end <= 1.")
        if not 0 <= self.codebook_warmup < 1:
            raise SettingsError(f"loss.codebook_warmup = {self.codebook_warmup}", fix="It is a share: 0 to below 1.")
        weights = self.beta, self.free_bits, self.bridge, self.slot_prediction, self.motion
        if min(*weights, self.rollout_steps, self.rollout_weight) < 0:
            raise SettingsError("loss weights must not be negative", fix="Check loss.*.")


@dataclass(frozen=True)
class Config:
    """A complete experiment. With the manifest and the seed it determines the run."""

    recipe: str
    """Name of the recipe that this config started from."""
    tokenizer: TokenizerConfig
    model: ModelConfig
    tokenizer_stage: StageConfig
    flam_stage: StageConfig
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    variant: str = "flam"
    """FLAM itself, a rival or an ablation (flam_core/variants.py), which changes the settings above."""
    tokenizer_sha256: str | None = None
    """Of the weights of a tokenizer that is given (`jobs/train.py --tokenizer_from`), so that stage 1 has no steps."""
    slot_hold: float = 0.0
    """Share of the stage-2 steps for which the factorizer stays as it started, so that the dynamics learn to use a good
    start (model.slot_start) before it can drift away."""
    latent_freeze: float = 1.0
    """Share of the stage-2 steps after which Gaussian latent actions are settled: the factorizer and the inverse
    dynamics stay as they are, the noise is off, and what follows from a latent action is learnt exactly. 1: never."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass. "auto" is bf16 where the hardware has it, else fp32."""
    weight_mean: float = 0.0
    """Of the weights, the exponential moving average with this decay, such as 0.999, is what is evaluated and kept
    (EMA). 0: the weights of the last step."""
    spike_factor: float = 10.0
    """A loss above so many times the median of the latest 100, and three times the largest of them, is a spike: the run
    goes back to the checkpoint before it and leaves the batch out. 0: only a loss that is not finite is one."""
    seed: int = 0
    """Seeds weights, sample order and noise."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if not 0 <= self.slot_hold < 1:
            raise SettingsError(f"slot_hold = {self.slot_hold}", fix="It is a share of the steps: 0 <= slot_hold < 1.")
        if not self.slot_hold <= self.latent_freeze <= 1:
            raise SettingsError(f"latent_freeze = {self.latent_freeze}", fix="Give slot_hold <= latent_freeze <= 1.")
        if self.flam_stage.steps == 0 == self.tokenizer_stage.steps:
            raise SettingsError(
                "flam_stage.steps = 0, and the tokenizer is given: nothing is left to train",
                fix="Set flam_stage.steps to at least 1, or train a tokenizer.",
            )
        if (self.tokenizer_stage.steps == 0) != (self.tokenizer_sha256 is not None):
            raise SettingsError(
                f"tokenizer_stage.steps = {self.tokenizer_stage.steps}, given tokenizer: {self.tokenizer_sha256}",
                fix="It is 0 with a given tokenizer (--tokenizer_from), and at least 1 without.",
            )
        if not 0 <= self.weight_mean < 1:
            raise SettingsError(f"weight_mean = {self.weight_mean}", fix="It is a decay: 0 (none) to below 1.")
        if self.spike_factor != 0 and self.spike_factor < 1:
            raise SettingsError(f"spike_factor = {self.spike_factor}", fix="Use 1 or more, or 0 for none.")
        if self.checkpoint_every < 1:
            raise SettingsError(f"checkpoint_every = {self.checkpoint_every}", fix="It must be at least 1.")
        if self.flam_stage.clip_frames < 2:
            raise SettingsError("flam_stage.clip_frames = 1: there is no next frame to predict", fix="Use 2 or more.")
        if self.model.state == "patches" and (self.loss.bridge or self.loss.slot_prediction):
            raise SettingsError(
                "loss.bridge and loss.slot_prediction are about slots, and model.state is patches", fix="Set both to 0."
            )
        if self.model.motion_readout and not self.loss.motion:
            raise SettingsError(
                "model.motion_readout with loss.motion 0, which weighs it: it would do nothing",
                fix="Set a weight, such as 0.1, or turn it off.",
            )
        if self.model.slot_training == "apart" and not self.loss.bridge:
            raise SettingsError(
                "model.slot_training apart, and nothing trains the slots", fix="Set loss.bridge, say to 1."
            )
        if self.model.temporal_window > self.flam_stage.clip_frames:
            raise SettingsError(
                f"model.temporal_window {self.model.temporal_window} is longer than flam_stage.clip_frames "
                f"{self.flam_stage.clip_frames}: what lies so far back would never be trained, and spoil long rollouts",
                fix="Lower the window or lengthen the clips.",
            )
        if self.loss.rollout_steps >= self.flam_stage.clip_frames:
            raise SettingsError(
                f"loss.rollout_steps {self.loss.rollout_steps} do not fit in clips of "
                f"{self.flam_stage.clip_frames} frames",
                fix="Choose fewer rollout steps or longer clips.",
            )

    def sha256(self) -> str:
        """Hex digest of the canonical JSON."""
        return hashlib.sha256(canonical_json(to_dict(self)).encode()).hexdigest()
