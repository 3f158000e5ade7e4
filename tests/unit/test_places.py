"""Where slots are, and what latent actions say of how they move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flam_core.model.places import ALL, MotionReadout, centres, fine_moves, moves, with_place

GRID = 6


def looking_at(*patches: tuple[int, int]) -> Tensor:
    """Weights [1, T, 1, P] of a slot that reads a patch (row, column) of each of T frames."""
    weights = torch.zeros(1, len(patches), 1, GRID, GRID)
    for t, (row, column) in enumerate(patches):
        weights[0, t, 0, row, column] = 1
    return weights.flatten(-2)


def test_the_centre_of_one_patch_is_its_middle_in_shares_of_the_side_x_first() -> None:
    found = centres(looking_at((0, 5), (3, 1)))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([[5.5, 0.5], [1.5, 3.5]]) / GRID)


def test_a_faint_look_at_the_background_hardly_moves_a_centre() -> None:
    entity = looking_at((0, 0))
    with_background = 0.8 * entity + 0.2 / GRID**2
    assert (centres(with_background) - centres(entity)).abs().max() < 1e-4


@pytest.mark.parametrize(("said", "error"), [((1.0, 0.0), 0.0), ((0.0, 0.0), 1.0), ((0.0, 1.0), 2.0)])
def test_the_error_is_the_squared_distance_in_patches_from_the_way_the_slot_went(
    said: tuple[float, float], error: float
) -> None:
    readout = MotionReadout(3)
    torch.nn.init.zeros_(readout.linear.weight)
    readout.linear.bias.data = torch.tensor(said)
    weights = looking_at((2, 2), (2, 3))  # one patch to the right
    torch.testing.assert_close(readout(torch.randn(1, 1, 1, 3), moves(weights)), torch.full((1, 1, 1), error))


def test_it_teaches_latent_actions_and_not_where_slots_look() -> None:
    actions = torch.randn(2, 3, 4, 5, requires_grad=True)
    weights = torch.rand(2, 4, 4, GRID**2, requires_grad=True)
    error = MotionReadout(5)(actions, moves(weights))
    assert error.shape == (2, 3, 4)
    error[0, 1, 2].backward()
    assert weights.grad is None
    assert actions.grad is not None
    own = torch.zeros(2, 3, 4, dtype=torch.bool)
    own[0, 1, 2] = True
    assert torch.equal(actions.grad.norm(dim=-1) > 0, own)


def test_it_cannot_be_satisfied_by_codes_that_change_partners_from_place_to_place() -> None:
    # Left and right are 1 and -1 in one half of the frame, and the other way round in the other.
    starts = [(2, column) for column in (1, 1, 4, 4)]
    ends = [(2, column) for column in (0, 2, 3, 5)]
    weights = torch.cat([looking_at(start, end) for start, end in zip(starts, ends, strict=True)])
    consistent = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1)
    swapped = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(4, 1, 1, 1)
    best: dict[str, float] = {}
    for name, actions in (("consistent", consistent), ("swapped", swapped)):
        torch.manual_seed(0)
        readout = MotionReadout(1)
        optimiser = torch.optim.Adam(readout.parameters(), lr=0.05)
        for _ in range(300):
            optimiser.zero_grad()
            error = readout(actions, moves(weights)).mean()
            error.backward()
            optimiser.step()
            best[name] = error.item()
    assert best["consistent"] < 1e-3
    assert best["swapped"] > 0.9


# --- places in slots ---


def shared_out(share: float) -> Tensor:
    """Weights [P] of a slot whose entity lies by `share` in one patch, and else in the one to its right."""
    left, right = looking_at((2, 2))[0, 0, 0], looking_at((2, 3))[0, 0, 0]
    return share * left + (1 - share) * right


def test_a_place_tells_moves_by_a_fraction_of_a_patch() -> None:
    weights = torch.stack([shared_out(share) for share in (1.0, 0.8, 0.5)])[None, :, None]
    torch.testing.assert_close(moves(weights, ALL)[0, :, 0], torch.tensor([[0.2, 0.0], [0.3, 0.0]]))
    assert moves(weights)[0, 0, 0, 0] < 0.01  # a centre that leaves out faint looks would not
    slots = torch.randn(1, 3, 1, 8)
    placed = with_place(slots, weights)
    assert torch.equal(placed[..., 2:], slots[..., 2:])
    torch.testing.assert_close(placed[0, :, 0, :2] / 4 + 0.5, centres(weights, ALL)[0, :, 0])
    torch.testing.assert_close(fine_moves(placed)[0, :, 0], 64 / GRID * moves(weights, ALL)[0, :, 0])


def test_a_place_teaches_where_slots_look() -> None:
    weights = torch.rand(2, 3, 4, GRID**2, requires_grad=True)
    fine_moves(with_place(torch.randn(2, 3, 4, 8), weights)).square().sum().backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() > 0
