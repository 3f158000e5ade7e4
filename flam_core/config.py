"""Every setting of the method: frozen dataclasses, checked on construction, hashable, with a JSON round-trip."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from flam_core.errors import SettingsError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class TokenizerConfig:
    """Single frames to a grid of features and back (flam-spec: stage 1)."""

    frame_size: int = 128
    """Height and width of a frame in pixels."""
    unshuffle: int = 1
    """Pixels are first folded into channels in blocks of this side: 2 quarters the cost of the first convolutions."""
    channels: tuple[int, ...] = (64, 128, 256, 256)
    """Width of each IMPALA stage. A stage halves the frame, so the stride is unshuffle * 2 ** len(channels)."""
    feature_dim: int = 128
    """Channels of a patch feature z."""
    fsq_levels: tuple[int, ...] = (4, 4, 4, 4, 4)
    """Levels of each quantised dimension; their product is the number of codes."""
    whitening: float | None = None
    """Bring all directions of feature space to like variance, with this share of the mean variance as a floor. Without
    it (None, the paper's form) the brightest entity dominates loss and attention, and the others do not bind."""

    def __post_init__(self) -> None:
        for name in ("frame_size", "unshuffle", "feature_dim"):
            if getattr(self, name) < 1:
                raise SettingsError(f"tokenizer.{name} = {getattr(self, name)}", fix="It must be at least 1.")
        if not self.channels or min(self.channels) < 1:
            raise SettingsError(f"tokenizer.channels = {self.channels}", fix="Give one positive width a stage.")
        if self.frame_size % self.stride:
            raise SettingsError(
                f"tokenizer.frame_size {self.frame_size} is not a multiple of the stride {self.stride}",
                fix="Choose another frame size, or fewer tokenizer.channels (each halves the frame).",
            )
        if self.whitening is not None and self.whitening <= 0:
            raise SettingsError(f"tokenizer.whitening = {self.whitening}", fix="Use a share above 0, such as 0.01.")
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise SettingsError(f"tokenizer.fsq_levels = {self.fsq_levels}", fix="Each needs at least 2 levels.")

    @property
    def stride(self) -> int:
        """Pixels of a patch's side."""
        return self.unshuffle * 2 ** len(self.channels)

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.frame_size // self.stride

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid**2

    @property
    def codes(self) -> int:
        """Size of the implied codebook."""
        return math.prod(self.fsq_levels)


@dataclass(frozen=True)
class ModelConfig:
    """The four parts of FLAM (flam-spec: stage 2)."""

    factors: int = 4
    """K: slots, each with its own latent action."""
    width: int = 256
    """Channels of a slot."""
    heads: int = 8
    """Attention heads."""
    blocks: int = 2
    """Blocks of the inverse dynamics, the forward dynamics and the aggregator."""
    iterations: int = 3
    """Slot-attention iterations, each followed by causal temporal attention."""
    slot_competition: Literal["slots", "dual"] = "slots"
    """Over what a patch's attention is normalised. "slots": the paper's softmax over slots. "dual": that, times a
    softmax over patches, so that a small entity stands out although nothing else claims the background."""
    slot_start: Literal["random", "motion"] = "random"
    """Where the learned starts of the slots begin: anywhere (the paper), or one on each kind of moving patch."""
    slot_focus: float = 1.0
    """Power that a slot's weights over patches are raised to. 1 is the paper's; from 2 on, a slot reads one compact
    thing, so that one slot cannot carry all entities."""
    slot_sharpness: float = 1.0
    """Initial factor on the slot-attention logits (it is learned). At 1 every slot starts by looking at everything
    alike; at 8 slots differ from the first step, which is what lets small entities bind."""
    aggregator_sharpness: float = 1.0
    """Initial standard deviation of the aggregator's attention logits. A patch must find the slot that moves onto it
    by matching positions; from 1 that takes several times as long as from 3 (docs/devlog.md)."""
    temporal_window: int = 10
    """Frames of the past that temporal attention sees. Time is relative, so rollouts may be longer than training."""
    latent: Literal["gaussian", "vq"] = "gaussian"
    """Continuous (reparameterised Gaussian) or discrete (one codebook shared by all slots) latent actions."""
    latent_width: int = 256
    """Total width of the latent actions, shared out evenly: latent_width / factors a slot."""
    initial_log_variance: float = -5.0
    """Of the posterior. From 0 the noise drowns the mean and the KL collapses (docs/devlog.md)."""
    codebook: int = 16
    """Codes of the VQ latent action."""
    commitment: float = 0.25
    """Weight of the VQ commitment loss."""

    def __post_init__(self) -> None:
        for name in ("factors", "width", "heads", "blocks", "iterations", "temporal_window", "latent_width"):
            if getattr(self, name) < 1:
                raise SettingsError(f"model.{name} = {getattr(self, name)}", fix="It must be at least 1.")
        for name in ("slot_focus", "slot_sharpness", "aggregator_sharpness"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"model.{name} = {getattr(self, name)}", fix="It must be above 0.")
        if self.width % self.heads:
            raise SettingsError(
                f"model.width {self.width} is not divisible by model.heads {self.heads}", fix="Change one of them."
            )
        if self.latent_width % self.factors:
            near = [k for k in range(1, self.latent_width + 1) if self.latent_width % k == 0]
            near = sorted(near, key=lambda k: abs(k - self.factors))[:2]
            raise SettingsError(
                f"model.latent_width {self.latent_width} is not divisible by model.factors {self.factors}",
                fix=f"Choose factors {' or '.join(map(str, sorted(near)))}, or a latent_width that is a multiple of "
                f"{self.factors}.",
            )
        if self.latent == "vq" and self.codebook < 2:
            raise SettingsError(f"model.codebook = {self.codebook}", fix="A codebook needs at least 2 codes.")
        if self.latent == "vq" and self.action_dim < 2:
            raise SettingsError(
                f"model.latent_width {self.latent_width} leaves each of {self.factors} slots one number, and codes of "
                "unit length need two",
                fix=f"Use a latent_width of {2 * self.factors} or more.",
            )

    @property
    def action_dim(self) -> int:
        """Width of one slot's latent action."""
        return self.latent_width // self.factors


@dataclass(frozen=True)
class StageConfig:
    """One training stage: what a batch holds, how many steps, and the optimiser."""

    steps: int
    """Optimiser steps."""
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
        for name in ("steps", "batch_clips", "clip_frames", "frame_skip"):
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
    bridge: float = 0.0
    """Weight of predicting the next features from the *true* next slots. It trains what slots carry without waiting
    for the dynamics to work; the paper has none."""
    slot_prediction: float = 0.0
    """Weight of the squared error between predicted and true next slots (whose gradient is stopped). It trains the
    dynamics without waiting for the aggregator; the paper has none."""
    rollout_steps: int = 0
    """Steps of slot-space rollout that are trained beside the one-step prediction; 0 for none."""
    rollout_weight: float = 1.0
    """Weight of the rollout loss."""

    def __post_init__(self) -> None:
        start, end = self.beta_warmup
        if not 0 <= start <= end <= 1:
            raise SettingsError(f"loss.beta_warmup = {self.beta_warmup}", fix="Give 0 <= start <= end <= 1.")
        if min(self.beta, self.bridge, self.slot_prediction, self.rollout_steps, self.rollout_weight) < 0:
            raise SettingsError("loss weights must not be negative", fix="Check loss.*.")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out episodes."""

    clips: int = 64
    """Clips of the test split that are rolled out."""
    horizon: int = 10
    """Steps of a rollout."""
    context: int = 1
    """True frames that a rollout starts from."""
    rollout: Literal["slots", "frames"] = "slots"
    """What is fed back: predicted slots, or slots of the predicted frames, which the tokenizer has cleaned."""
    probe_clips: int = 128
    """Clips of the train split and of the test split that the linear probes (DCI) use."""

    def __post_init__(self) -> None:
        for name in ("clips", "horizon", "context", "probe_clips"):
            if getattr(self, name) < 1:
                raise SettingsError(f"evaluation.{name} = {getattr(self, name)}", fix="It must be at least 1.")


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
    slot_hold: float = 0.0
    """Share of the stage-2 steps for which the factorizer stays as it started, so that the dynamics learn to use a good
    start (model.slot_start) before it can drift away."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass. "auto" is bf16 where the hardware has it, else fp32."""
    seed: int = 0
    """Seeds weights, sample order and noise."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if not 0 <= self.slot_hold < 1:
            raise SettingsError(f"slot_hold = {self.slot_hold}", fix="It is a share of the steps: 0 <= slot_hold < 1.")
        if self.checkpoint_every < 1:
            raise SettingsError(f"checkpoint_every = {self.checkpoint_every}", fix="It must be at least 1.")
        if self.flam_stage.clip_frames < 2:
            raise SettingsError("flam_stage.clip_frames = 1: there is no next frame to predict", fix="Use 2 or more.")
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


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types. Equal configs give equal dicts: a 2 where a float is meant becomes 2.0."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return json.loads(json.dumps(dataclasses.asdict(from_dict(type(config), plain))))


def from_dict(kind: type[ConfigT], values: Any, where: str = "config") -> ConfigT:
    """Rebuild a config of type `kind` from `to_dict`'s output.

    Raises SettingsError for a field that is unknown, missing or of the wrong type.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where} is {type(values).__name__}, not an object", fix="Is it written by flam?")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise SettingsError(
            f"{where} has unknown fields {', '.join(unknown)}", fix="It was written by another version of flam."
        )
    known = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**known)
    except TypeError as error:
        raise SettingsError(f"{where} is incomplete: {error}", fix="It was written by another version.") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(_convert(k, v, where) for k, v in zip(inner, value, strict=True))
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            if option is type(None) and value is None:
                return None
            if option is not type(None) and value is not None:
                return _convert(option, value, where)
    elif origin is Literal:
        if value in arguments:
            return value
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise SettingsError(f"{where} = {value!r} is not a valid {kind}", fix="Was the file edited by hand?")


def differing_fields(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configs of one type differ, with both values."""
    found = []
    for f in dataclasses.fields(a):
        left, right, name = getattr(a, f.name), getattr(b, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(left) and type(left) is type(right):
            found += differing_fields(left, right, f"{name}.")
        elif left != right:
            found.append(f"{name} ({left} there, {right} here)")
    return found
