"""Training by several ranks, or in parts, or with a mean of the weights: what must not depend on it, and what does."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from flam_core.config import Config
from flam_core.learning.ema import WeightMean
from flam_core.learning.recompute import BLOCKS
from flam_core.learning.state import TrainState
from flam_core.learning.trainer import Trainer
from flam_core.ranks import Share, shard
from flam_core.saved_model import weights_to_bytes
from tests.unit.test_trainer import CONFIG, CPU, STAGE_1, STAGE_2, config

BATCH, BROKEN_STEP, BROKEN = 5, 2, 3
"""Clips of a batch, which two and three ranks cannot share evenly; and one, at a step, that is left out."""


def settings(**changes: Any) -> Config:
    small = config(**changes)
    return replace(
        small,
        tokenizer_stage=replace(small.tokenizer_stage, batch_clips=BATCH),
        flam_stage=replace(small.flam_stage, batch_clips=BATCH),
    )


def step(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's part of the batch of the trainer's next step; one clip is broken once."""
    stage = trainer.config.tokenizer_stage if trainer.stage == 0 else trainer.config.flam_stage
    generator = torch.Generator().manual_seed(trainer.step)
    frames = torch.randint(0, 256, (BATCH, stage.clip_frames, 16, 16, 3), generator=generator).to(torch.uint8)
    mine = trainer.share.places(BATCH)
    good = [place for place in mine if (trainer.step, place) != (BROKEN_STEP, BROKEN)]
    ids = [f"{trainer.step}.{place}" for place in good]
    measured = trainer.train_step(frames[good], ids, None, [place - mine.start for place in good])
    return trainer.over_ranks(measured, len(good))


def sharing(module: torch.nn.Module) -> torch.nn.Module:
    return shard(module, BLOCKS)


def train(rank: int, world: int, place: str, chosen: Config, kind: str = "ddp") -> None:
    """A rank's whole run; the first leaves state and losses. `fsdp-resumed`: stopped and restored at every step."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    wrap = (sharing if kind.startswith("fsdp") else DistributedDataParallel) if world > 1 else None
    at_a_time = 1 if kind == "fsdp-parts" else None

    def begun() -> Trainer:
        return Trainer(chosen, CPU, share=Share(rank, world, at_a_time), wrap=wrap)

    trainer = begun()
    losses = []
    for _ in range(trainer.total_steps):
        losses.append(step(trainer))
        if kind == "fsdp-resumed" and trainer.step < trainer.total_steps:
            told: list[Any] = [trainer.state()]
            dist.broadcast_object_list(told)
            trainer = begun()
            trainer.restore(told[0])
    state = trainer.state()
    model = trainer.model_in_use()
    if rank == 0 and chosen.weight_mean == 0:
        assert weights_to_bytes(model) == (state.model if state else b"")
    if rank == 0:
        assert state is not None
        torch.save((vars(state), losses), Path(place) / "done.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        # Not by the interpreter's end: there, one process in twenty is aborted by a thread that torch did not wait for.
        os._exit(0)


def trained(world: int, chosen: Config, kind: str = "ddp") -> tuple[TrainState, list[dict[str, Tensor]]]:
    with tempfile.TemporaryDirectory() as place:
        if world == 1:
            train(0, 1, place, chosen)
        else:
            torch.multiprocessing.spawn(train, (world, place, chosen, kind), nprocs=world)
        state, losses = torch.load(Path(place) / "done.pt", weights_only=True)
        return TrainState(**state), losses


def close(one: TrainState, other: TrainState) -> None:
    a, b = safetensors.torch.load(one.model), safetensors.torch.load(other.model)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"slot_start": "motion", "beta": 1e-2, "rollout_steps": 1, "latent_freeze": 0.75},
        {"slot_start": "slow", "slot_place": True, "beta": 1e-2, "rollout_steps": 1, "latent_freeze": 0.75},
        {"latent": "vq", "codebook_decay": 0.9, "codebook_revival": 0.9, "codebook_centring": True},
    ],
    ids=["gaussian", "slow", "vq"],
)
def test_any_number_of_ranks_learns_the_same_from_the_same_clips(changes: dict[str, Any]) -> None:
    chosen = settings(**changes)
    alone, losses = trained(1, chosen)
    for world in (2, 3):
        state, told = trained(world, chosen)
        assert state.meta == alone.meta  # what was consumed is in it
        close(state, alone)
        for mine, other in zip(told, losses, strict=True):
            assert mine.keys() == other.keys()
            key = "flam/loss" if "flam/loss" in mine else "tokenizer/loss"
            assert float(mine[key]) == pytest.approx(float(other[key]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp-resumed", "fsdp-parts"])
def test_weights_that_are_shared_out_learn_the_same(kind: str) -> None:
    chosen = replace(settings(slot_start="motion", rollout_steps=1), weight_mean=0.9 if kind == "fsdp-resumed" else 0.0)
    alone, losses = trained(1, chosen)
    state, told = trained(2, chosen, kind)
    assert state.meta == alone.meta
    close(state, alone)
    if alone.mean is not None and state.mean is not None:
        close(replace(state, model=state.mean), replace(alone, model=alone.mean))
    for mine, other in zip(told, losses, strict=True):
        key = "flam/loss" if "flam/loss" in mine else "tokenizer/loss"
        assert float(mine[key]) == pytest.approx(float(other[key]), rel=1e-3, abs=1e-5)
        key = key.replace("loss", "grad_norm")
        assert float(mine[key]) == pytest.approx(float(other[key]), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("latent", ["gaussian", "vq"])
@pytest.mark.parametrize("at_a_time", [1, 2, 4])
def test_gradients_of_parts_add_up(latent: str, at_a_time: int) -> None:
    chosen = settings(latent=latent)
    whole, parts = Trainer(chosen, CPU), Trainer(chosen, CPU, share=Share(at_a_time=at_a_time))
    for _ in range(whole.total_steps):
        one, other = step(whole), step(parts)
        assert one.keys() == other.keys()
        key = "flam/loss" if "flam/loss" in one else "tokenizer/loss"
        assert float(other[key]) == pytest.approx(float(one[key]), rel=1e-3)
    assert whole.state().meta == parts.state().meta
    close(whole.state(), parts.state())


def test_recomputed_activations_give_the_same_run() -> None:
    chosen = settings()
    plain, frugal = Trainer(chosen, CPU), Trainer(chosen, CPU, recomputed=True)
    for _ in range(plain.total_steps):
        step(plain)
        step(frugal)
    assert plain.state().model == frugal.state().model


# The mean of the weights


def test_the_mean_is_that_of_all_steps_first_and_then_forgets() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    mean = WeightMean(module, decay=0.75)
    for value, expected in ((4.0, 4.0), (2.0, 3.0), (0.0, 2.0), (6.0, 3.0), (3.0, 3.0), (7.0, 4.0)):
        with torch.no_grad():
            module.weight.fill_(value)
        mean.update()
        assert mean.state()["weight"].item() == pytest.approx(expected)


@pytest.mark.parametrize("at", range(1, STAGE_1 + STAGE_2 + 1))
def test_a_run_with_a_mean_continues_bit_for_bit(at: int) -> None:
    chosen = replace(settings(), weight_mean=0.9)
    unbroken, stopped = Trainer(chosen, CPU), Trainer(chosen, CPU)
    for _ in range(unbroken.total_steps):
        step(unbroken)
    for _ in range(at):
        step(stopped)
    resumed = Trainer(chosen, CPU)
    resumed.restore(stopped.state())
    for _ in range(unbroken.total_steps - at):
        step(resumed)
    one, other = unbroken.model_in_use().state_dict(), resumed.model_in_use().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_used_is_the_mean_and_what_trains_is_not() -> None:
    trainer, plain = Trainer(replace(settings(), weight_mean=0.9), CPU), Trainer(settings(), CPU)
    for _ in range(STAGE_1):
        step(trainer)
        step(plain)
    assert trainer.state().model == plain.state().model
    assert not torch.equal(trainer.model_in_use().tokenizer.to_codes.weight, trainer.model.tokenizer.to_codes.weight)
    used = trainer.model_in_use().tokenizer.to_codes.weight.clone()
    step(trainer)  # stage 2 takes it over
    assert torch.equal(trainer.model.tokenizer.to_codes.weight, used)
    assert CONFIG.weight_mean == 0
