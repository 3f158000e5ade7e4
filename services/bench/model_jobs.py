"""What `jobs/bench.py model` measures: training steps in several forms, and FLAM beside its equal in weight."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass, replace

from flam_core.config import Config, ModelConfig
from flam_core.errors import SettingsError
from flam_core.flops import Precision
from flam_core.variants import dynamics_weights, monolithic_gaussian, monolithic_vq, no_motion

COMPARED_FRAMES = 10
"""Frames of the clips on which FLAM and the monolithic model are compared."""
_TOLERANCE = 0.05
_CHANNELS = (8, 4, 2, 1)
"""A head's channels are multiples of these, tried in turn: 8 is what fused attention and tensor cores want."""
_MOST_BLOCKS, _MOST_WIDTH = 3, 2
"""How many times FLAM's the monolithic model's may be."""

_weights = functools.cache(dynamics_weights)


@dataclass(frozen=True)
class StepJob:
    """A training step, completely described."""

    config: Config
    stage: int
    """0 tokenizer, 1 FLAM."""
    compile: bool = False
    """torch.compile the trained module, and in stage 1 the frozen encoder."""
    plain_attention: bool = False
    """Attention as two matrix products and a softmax, each with its own tensor, instead of one fused kernel."""

    @property
    def clips(self) -> int:
        """Clips of a step."""
        return (self.config.flam_stage if self.stage else self.config.tokenizer_stage).batch_clips

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return (self.config.flam_stage if self.stage else self.config.tokenizer_stage).clip_frames


def with_clips(config: Config, clips: int | None) -> Config:
    """The config with `clips` clips in a step of either stage; None leaves the recipe's."""
    if clips is None:
        return config
    return replace(
        config,
        tokenizer_stage=replace(config.tokenizer_stage, batch_clips=clips),
        flam_stage=replace(config.flam_stage, batch_clips=clips),
    )


def stage_jobs(
    config: Config, stage: int, precisions: tuple[Precision, ...], base: Precision, compiled: bool
) -> dict[str, StepJob]:
    """The forms that a stage's step is measured in, by name: each precision; from `base` on, compiled and, where there
    is attention (stage 1), with that unfused."""
    plain = StepJob(replace(config, precision=base), stage)
    jobs = {name: replace(plain, config=replace(config, precision=name)) for name in precisions}
    if compiled:
        jobs["compile"] = replace(plain, compile=True)
    if stage == 1:
        jobs["plain_attention"] = replace(plain, plain_attention=True)
    return jobs


def comparison_jobs(config: Config, base: Precision, compiled: bool) -> dict[str, StepJob]:
    """Stage-2 steps on clips of 10 frames: FLAM, FLAM without the losses that only slots have, and the monolithic
    model of equal weights; the first and the last also compiled."""
    frames = replace(config.flam_stage, clip_frames=COMPARED_FRAMES)
    flam = StepJob(replace(config, precision=base, flam_stage=frames), 1)
    monolithic = replace(flam, config=monolithic_of(flam.config))
    jobs = {
        "flam": flam,
        "flam_same_losses": replace(flam, config=_with_common_losses(flam.config)),
        "monolithic": monolithic,
    }
    if compiled:
        jobs |= {
            "flam_compile": replace(flam, compile=True),
            "monolithic_compile": replace(monolithic, compile=True),
        }
    return jobs


def monolithic_of(config: Config, tolerance: float = _TOLERANCE) -> Config:
    """The config of the model with one latent action and no slots whose dynamics have as many weights as FLAM's, within
    `tolerance` (a share). Of several, the one most like FLAM in width, blocks and channels of a head.

    `flam_core.variants` matches weights more closely by the width alone; here both models must also suit the fused
    kernels equally well, or the kernels would be what is compared. Raises SettingsError if there is none.
    """
    target = _weights(config.model, config.tokenizer)
    bare = monolithic_vq(config) if config.model.latent == "vq" else monolithic_gaussian(config)

    def off(model: ModelConfig) -> float:
        return abs(_weights(model, config.tokenizer) / target - 1)

    tried: list[ModelConfig] = []
    for channels in _CHANNELS:
        tried += _sizes(bare, config.model, target, channels)
        near = [model for model in tried if off(model) <= tolerance]
        if near:
            return replace(bare, model=min(near, key=functools.partial(_unlikeness, config.model)))
    best = min(tried, key=off)
    raise SettingsError(
        f"recipe {config.recipe}: no monolithic model has as many weights as its dynamics ({target:,}) within "
        f"{tolerance:.1%}; the nearest, {best.blocks} blocks of width {best.width}, is {off(best):.1%} off",
        fix="Choose another model.width.",
    )


def _sizes(bare: Config, flam: ModelConfig, target: int, channels: int) -> list[ModelConfig]:
    """For each number of blocks, from FLAM's on, the widths, multiples of `channels`, with about `target` weights."""

    def sized(blocks: int, width: int) -> ModelConfig:
        heads = _heads(flam, width, channels)
        return replace(bare.model, blocks=blocks, width=width, heads=heads)

    def weights(blocks: int, width: int) -> int:
        return _weights(sized(blocks, width), bare.tokenizer)

    widths = range(channels, _MOST_WIDTH * flam.width + 1, channels)
    found = []
    for blocks in range(flam.blocks, _MOST_BLOCKS * flam.blocks + 1):
        at = bisect.bisect_left(widths, target, key=functools.partial(weights, blocks))
        found += [sized(blocks, width) for width in widths[max(0, at - 1) : at + 1]]
    return found


def _heads(flam: ModelConfig, width: int, channels: int) -> int:
    """How many heads, of a multiple of `channels` each, bring them nearest to the size of FLAM's."""
    sizes = [size for size in range(channels, width + 1, channels) if width % size == 0]
    return width // min(sizes, key=lambda size: abs(math.log(size * flam.heads / flam.width)))


def _unlikeness(one: ModelConfig, other: ModelConfig) -> float:
    """How far apart two models are in width, blocks and channels of a head."""
    ratios = (
        one.width / other.width,
        one.blocks / other.blocks,
        (one.width / one.heads) / (other.width / other.heads),
    )
    return sum(abs(math.log(ratio)) for ratio in ratios)


def _with_common_losses(config: Config) -> Config:
    """With those losses alone that a model without slots has too."""
    return replace(no_motion(config), loss=replace(config.loss, bridge=0.0, slot_prediction=0.0))
