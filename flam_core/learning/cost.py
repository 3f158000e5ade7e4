"""What a training step costs: its FLOPs, by counting one, and its time here, by taking some."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from flam_core.config import Config
from flam_core.flops import CountedForward, count_flops, training_flops
from flam_core.learning.trainer import Trainer

TIMED_STEPS = 3


def step_flops(config: Config, stage: int, device: torch.device) -> float:
    """FLOPs of a step of stage 0 (tokenizer) or 1 (FLAM) on the global batch: counted on one clip of noise."""
    counted: list[CountedForward] = []

    def wrap(module: nn.Module) -> nn.Module:
        counted.append(CountedForward(module))
        return counted[-1]

    # A tokenizer that is given costs what one of its own does.
    stages = [replace(one, batch_clips=1) for one in (config.tokenizer_stage, config.flam_stage)]
    first = replace(stages[0], steps=max(1, stages[0].steps))
    alone = replace(config, tokenizer_sha256=None, tokenizer_stage=first, flam_stage=stages[1], weight_mean=0.0)
    trainer = Trainer(alone, device, wrap=wrap)
    trainer.step = stage * first.steps
    settings, size = (first, stages[1])[stage], config.tokenizer.frame_size
    frames = torch.randint(0, 256, (1, settings.clip_frames, size, size, 3), dtype=torch.uint8, device=device)
    wanted = config.model.true_actions
    actions = None if wanted is None else torch.zeros(1, settings.clip_frames, *wanted[:2], device=device)
    trainer.train_step(frames, ["one"], actions)
    frozen = count_flops(trainer.model.encode, frames)[1] if stage else 0
    whole = (config.tokenizer_stage, config.flam_stage)[stage]
    return training_flops(sum(one.flops for one in counted), frozen) * whole.batch_clips


def step_seconds(config: Config, stage: int, threads: int) -> float:
    """Of a step of stage 0 (tokenizer) or 1 (FLAM) on this machine's CPU with so many threads, on noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = replace(config.tokenizer_stage, steps=1 + TIMED_STEPS if stage == 0 else 1)
        trainer = Trainer(replace(config, tokenizer_sha256=None, tokenizer_stage=first), torch.device("cpu"))
        trainer.step = stage
        settings, size = (config.tokenizer_stage, config.flam_stage)[stage], config.tokenizer.frame_size
        shape = (settings.batch_clips, settings.clip_frames, size, size, 3)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8)
        ids = [str(i) for i in range(settings.batch_clips)]
        trainer.train_step(frames, ids)
        begun = time.perf_counter()
        for _ in range(TIMED_STEPS):
            trainer.train_step(frames, ids)
        return (time.perf_counter() - begun) / TIMED_STEPS
    finally:
        torch.set_num_threads(before)
