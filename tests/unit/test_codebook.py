"""The codebook of discrete latent actions: moving averages, dead codes, and that it is part of a run's state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flam_core.config import LossConfig, ModelConfig
from flam_core.errors import SettingsError
from flam_core.model.latent_action import VQLatent
from tests.unit.test_trainer import CONFIG, run, started, weights

MODEL = ModelConfig(factors=2, width=8, heads=2, latent_width=6, latent="vq", codebook=4, codebook_decay=0.5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def seen(latent: VQLatent, x: torch.Tensor) -> None:
    """Let the latent see exactly x [N, A]: the head is bypassed by being the identity."""
    latent.head = torch.nn.Identity()  # type: ignore[assignment]
    latent(x[None, :, None])


def test_a_code_moves_to_the_mean_of_what_falls_to_it() -> None:
    latent = VQLatent(MODEL)
    centres = F.normalize(torch.tensor([[1.0, 0, 0.3], [-1, 0, 0.3], [0, 1, -0.3], [0, -1, -0.3]]), dim=-1)
    with torch.no_grad():
        latent.codebook.weight.copy_(centres)
        latent.sums.copy_(centres / 4)
    x = F.normalize(centres.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 3), dim=-1)
    for _ in range(30):
        seen(latent, x)
        latent.after_step()
    means = F.normalize(x.view(4, 50, 3).mean(dim=1), dim=-1)
    assert torch.allclose(latent.codebook.weight, means, atol=1e-3)
    assert torch.allclose(latent.usage, torch.full((4,), 0.25), atol=1e-3)


def test_a_code_that_nothing_falls_to_stays_where_it_is() -> None:
    latent = VQLatent(MODEL)
    with torch.no_grad():
        latent.codebook.weight.copy_(
            F.normalize(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 0, -1]]), dim=-1)
        )
        latent.sums.copy_(latent.codebook.weight / 4)
    before = latent.codebook.weight[1:].clone()
    for _ in range(20):
        seen(latent, F.normalize(torch.tensor([[1.0, 0.2, 0.0]]).repeat(10, 1), dim=-1))
        latent.after_step()
    assert torch.allclose(latent.codebook.weight[1:], before, atol=1e-6)
    assert latent.codebook.weight[0, 1] > 0.1
    assert latent.usage[0] > 0.99


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_dead_code_moves_to_a_transition_and_is_then_used(decay: float | None) -> None:
    latent = VQLatent(replace(MODEL, codebook_decay=decay, codebook_revival=0.1))
    x = F.normalize(torch.randn(400, 3) + torch.tensor([5.0, 0.0, 0.0]), dim=-1)
    with torch.no_grad():
        latent.codebook.weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [-1, 0.1, 0], [-1, 0, 0.1]]))
        latent.sums.copy_(F.normalize(latent.codebook.weight, dim=-1) / 4)
    used = []
    for _ in range(400):
        latent.head = torch.nn.Identity()  # type: ignore[assignment]
        used.append(len(latent(x[None, :, None]).codes.unique()))
        latent.after_step()
    assert used[0] == 1
    assert used[-1] == 4


def test_without_a_revival_share_dead_codes_stay_dead() -> None:
    latent = VQLatent(MODEL)
    with torch.no_grad():
        latent.codebook.weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [-1, 0.1, 0], [-1, 0, 0.1]]))
        latent.sums.copy_(F.normalize(latent.codebook.weight, dim=-1) / 4)
    for _ in range(100):
        seen(latent, torch.tensor([[1.0, 0.0, 0.0]]).repeat(8, 1))
        latent.after_step()
    assert len(latent(torch.randn(1, 50, 1, 3).abs()).codes.unique()) == 1


@pytest.mark.parametrize("centring", [False, True])
def test_centring_spends_no_code_on_which_slot_it_is(centring: bool) -> None:
    """Two slots far apart, each with two kinds of transitions that differ little."""
    latent = VQLatent(replace(MODEL, codebook_decay=0.9, codebook_revival=0.1, codebook_centring=centring))
    latent.head = torch.nn.Identity()  # type: ignore[assignment]
    kind = torch.arange(200) % 2
    slots = torch.tensor([[5.0, 0, 0], [-5.0, 0, 0]])
    codes = torch.zeros(())
    for _ in range(300):
        y = slots + 0.5 * (2 * kind - 1)[:, None, None] * torch.tensor([0.0, 1, 0]) + 0.01 * torch.randn(200, 2, 3)
        codes = latent(y[None]).codes[0]
        latent.after_step()
    told = [set(codes[kind == k, slot].tolist()) for slot in range(2) for k in range(2)]
    if centring:
        assert told[0].isdisjoint(told[1])
        assert told[2].isdisjoint(told[3])
        assert told[0] == told[2]  # the same kind has the same codes in both slots
        assert torch.allclose(latent.state_dict()["centre"], slots, atol=0.1)
    else:
        assert told[0].isdisjoint(told[2])


def test_centring_counts_from_the_mean_of_the_first_batch_at_once() -> None:
    latent = VQLatent(replace(MODEL, codebook_centring=True))
    latent.head = torch.nn.Identity()  # type: ignore[assignment]
    y = torch.randn(1, 40, 2, 3)
    latent(y)
    latent.after_step()
    assert torch.allclose(latent.state_dict()["centre"], y[0].mean(dim=0), atol=1e-6)


def test_nothing_is_quantised_while_the_codebook_warms_up() -> None:
    latent = VQLatent(MODEL)
    latent.quantising = False
    before = latent.codebook.weight.clone()
    h = torch.randn(1, 20, 2, 8)
    found = latent(h)
    assert torch.allclose(found.sample, F.normalize(latent.head(h), dim=-1), atol=1e-6)
    assert torch.equal(found.sample, found.mean)
    assert not found.penalty.any()
    latent.after_step()
    assert torch.equal(latent.codebook.weight, before)


def test_codes_start_as_the_clusters_of_what_was_seen() -> None:
    latent = VQLatent(MODEL)
    centres = F.normalize(torch.tensor([[1.0, 0, 0.3], [-1, 0, 0.3], [0, 1, -0.3], [0, -1, -0.3]]), dim=-1)
    seen(latent, F.normalize(centres.repeat_interleave(30, 0) + 0.05 * torch.randn(120, 3), dim=-1))
    latent.start_codes(latent.seen(), seed=0)
    nearest = (latent.codebook.weight @ centres.T).max(dim=0)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert nearest.values.min() > 0.99
    assert torch.allclose(latent.usage, torch.full((4,), 0.25))


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_warmed_up_codebook_is_the_same_whenever_the_run_is_restored(at: int) -> None:
    """Of four steps of stage 2 the first two are not quantised."""
    model = replace(CONFIG.model, latent="vq", codebook_decay=0.9, codebook_centring=True)
    settings = replace(CONFIG, model=model, loss=replace(CONFIG.loss, codebook_warmup=0.5))
    unbroken = started(settings, until=3 + at)
    assert isinstance(unbroken.model.dynamics.latent, VQLatent)
    assert unbroken.model.dynamics.latent.quantising == (at in (0, 3))  # at the start none has said otherwise
    resumed = started(settings)
    saved = unbroken.state()
    assert saved is not None
    resumed.restore(saved)
    for trainer in (unbroken, resumed):
        run(trainer, trainer.total_steps)
    there, here = weights(unbroken.model), weights(resumed.model)
    assert all(torch.equal(value, here[name]) for name, value in there.items())
    other = replace(settings, loss=replace(CONFIG.loss, codebook_warmup=0.0))
    assert not torch.equal(
        weights(started(other, until=7).model)["dynamics.inverse.latent.codebook.weight"],
        there["dynamics.inverse.latent.codebook.weight"],
    )


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_the_warm_up_is_a_share(share: float) -> None:
    with pytest.raises(SettingsError, match=r"loss.codebook_warmup"):
        LossConfig(codebook_warmup=share)


def test_evaluation_leaves_the_codebook_alone() -> None:
    latent = VQLatent(replace(MODEL, codebook_revival=0.5, codebook_centring=True)).eval()
    before = {name: value.clone() for name, value in latent.state_dict().items() if "head" not in name}
    latent(torch.randn(2, 5, 2, 8))
    latent.after_step()
    after = latent.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("at", [4, 6])
def test_a_restored_run_with_moving_codes_continues_bit_for_bit(at: int) -> None:
    model = replace(CONFIG.model, latent="vq", codebook_decay=0.9, codebook_revival=0.9, codebook_centring=True)
    settings = replace(CONFIG, model=model)
    unbroken = started(settings, until=at)
    saved = unbroken.state()
    resumed = started(settings)
    assert saved is not None
    resumed.restore(saved)
    for trainer in (unbroken, resumed):
        run(trainer, trainer.total_steps)
    there, here = weights(unbroken.model), weights(resumed.model)
    assert all(torch.equal(value, here[name]) for name, value in there.items())
    assert not torch.equal(
        weights(started(settings).model)["dynamics.inverse.latent.codebook.weight"],
        here["dynamics.inverse.latent.codebook.weight"],
    )
