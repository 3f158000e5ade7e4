"""Pruning keeps the slots that predictions need, whatever number the model was given."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from flam_core.errors import SettingsError
from flam_core.evaluation.prune import prune
from flam_core.model.flam import Flam
from tests.evaluation_fixture import CELLS, CONFIG, PatchPuppets, Puppets, grid_clips, puppet_clips, small_flam


class Prunable(Puppets):
    """Slots 0 and 2 have a puppet each (red, green), slots 1 and 3 have nothing to do."""

    def __init__(self, keep: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__(factors=len(keep))
        self.keep = keep

    def _puppet(self, z: Tensor, slot: int) -> Tensor:
        """How much of each patch [B, T, P] is the slot's."""
        return {0: z[..., 0], 2: z[..., 1]}.get(slot, 1e-3 * torch.ones_like(z[..., 0]))

    def _places(self, z: Tensor) -> Tensor:
        cell = torch.stack([self._puppet(z, slot) for slot in self.keep], dim=-1).argmax(dim=2)
        return torch.stack([cell % CELLS, cell // CELLS], dim=-1).float()

    def slots(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        masks = torch.stack([self._puppet(z, slot) for slot in self.keep], dim=2) + 1e-4
        return self._places(z), masks / masks.sum(dim=2, keepdim=True)

    def _draw(self, place: Tensor) -> Tensor:
        drawn = torch.full((len(place), 2, 2), -1.0)  # off the stage
        for row, slot in enumerate(self.keep):
            if slot in (0, 2):
                drawn[:, slot // 2] = place[:, row]
        return super()._draw(drawn)

    def pruned(self, keep: list[int]) -> Prunable:
        return Prunable(tuple(self.keep[i] for i in keep))


def test_slots_that_nothing_needs_go_and_the_others_stay() -> None:
    found = prune(cast(Flam, Prunable()), puppet_clips(8), CONFIG, seed=0)
    assert found.kept == (0, 2)
    assert found.used == (0, 2)
    assert found.after == found.before
    assert cast(Prunable, found.model).keep == (0, 2)


def test_a_model_of_what_is_needed_stays_whole() -> None:
    found = prune(cast(Flam, Prunable((2, 0))), puppet_clips(8), CONFIG, seed=0)
    assert found.kept == (0, 1)


def test_one_slot_is_left_at_least() -> None:
    # Random weights predict about the same with any slots: every one but the last can go.
    found = prune(small_flam(), grid_clips(6, 1), CONFIG, seed=0, tolerance_db=100.0)
    assert len(found.kept) == 1
    assert found.model.factors == 1


def test_a_model_without_slots_is_refused() -> None:
    with pytest.raises(SettingsError, match="without slots"):
        prune(cast(Flam, PatchPuppets()), puppet_clips(4), CONFIG, seed=0)


@pytest.mark.parametrize(("latent", "start"), [("gaussian", "random"), ("vq", "random"), ("gaussian", "slow")])
def test_a_slot_that_stays_is_what_it_was(latent: str, start: str) -> None:
    """Its start, what it looks for and its centre go with it; all else is shared by slots."""
    model = small_flam(latent=latent, codebook_centring=latent == "vq", slot_start=start).eval()
    if start == "slow":
        model.state_dict()["dynamics.factorizer.looked_for"].copy_(torch.randn(3, 32))
    if latent == "vq":
        model.state_dict()["dynamics.inverse.latent.centre"].copy_(torch.randn(3, 8))
    smaller = model.pruned([2, 0])
    before, after = model.state_dict(), smaller.state_dict()
    assert torch.equal(after["dynamics.factorizer.initial"], before["dynamics.factorizer.initial"][[2, 0]])
    if start == "slow":
        looked_for = "dynamics.factorizer.looked_for"
        assert torch.equal(after[looked_for], before[looked_for][[2, 0]])
    if latent == "vq":
        centre = "dynamics.inverse.latent.centre"
        assert torch.equal(after[centre], before[centre][[2, 0]])
    own = ("factorizer.initial", "factorizer.looked_for", "latent.centre")
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.endswith(own))
