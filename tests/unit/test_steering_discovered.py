"""What slots have learnt to do is found, kept bit for bit, and leads where it is asked to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from flam_core.errors import DataError, SettingsError
from flam_core.saved_model import save_model
from flam_core.steering.directions import DIRECTIONS, Examples, directed
from flam_core.steering.discovered import ACTIONS_FILE, discover_actions, load_actions, save_actions
from flam_core.steering.scene import Scene
from tests.evaluation_fixture import CELLS
from tests.steering_fixture import WatchedPuppets, clips, found_in_puppets, steered

STEP = torch.tensor([1.0, 1.0]) / CELLS


def test_clusters_of_a_continuous_action_are_the_moves_of_puppets() -> None:
    found = found_in_puppets(WatchedPuppets())
    for slot in range(2):
        moves = {tuple(v) for v in found.vectors[slot].round().int().tolist()}
        assert moves == {(0, 0), (0, -1), (1, 0), (0, 1), (-1, 0)}
        assert torch.allclose(found.motion[slot], found.vectors[slot] * STEP, atol=1e-3)
        assert torch.allclose(found.usage[slot].sum(), torch.ones(()))
        assert (found.usage[slot].diff() <= 0).all()
        for way, direction in DIRECTIONS.items():
            assert torch.equal(found.vector(slot, found.arrows(slot)[way]).round(), torch.tensor(direction))
        going = found.motion[slot].norm(dim=-1) > 0.01
        assert (found.consistency[slot][going] > 0.99).all()
        assert found.still(slot) == found.arrows(slot)["still"]
        assert found.examples[slot].stride == pytest.approx(1 / CELLS, abs=1e-3)
    assert found.entity == (0, 1)


def test_equal_seeds_find_the_same() -> None:
    first, second = found_in_puppets(WatchedPuppets()), found_in_puppets(WatchedPuppets())
    assert all(torch.equal(a, b) for a, b in zip(first.vectors, second.vectors, strict=True))
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(first.examples, second.examples, strict=True))


def test_codes_of_a_discrete_action_are_its_codebooks_those_in_use_first() -> None:
    model, film = steered(latent="vq", codebook=6), clips(4)
    found = discover_actions(model, film, most=4)
    codes = model.infer(model.slots(model.encode(film))[0]).codes
    assert codes is not None
    for slot in range(3):
        counts = torch.bincount(codes[..., slot].flatten(), minlength=6)
        ordered = counts.argsort(descending=True, stable=True)[:4]
        latent = cast(Any, model.dynamics.latent)
        assert torch.equal(found.vectors[slot], latent.vectors(ordered).cpu())
        assert torch.allclose(found.usage[slot], counts[ordered] / counts.sum())
    inferred = model.infer_actions(model.slots(model.encode(film))[0])
    nearest = found.nearest(inferred)
    for slot in range(3):
        kept = torch.bincount(codes[..., slot].flatten(), minlength=6).argsort(descending=True, stable=True)[:4]
        place = (codes[..., slot, None] == kept).int()  # a code that is not kept has none
        assert torch.equal(nearest[..., slot], place.argmax(dim=-1).where(place.any(dim=-1), -1))
        assert found.other(slot) == pytest.approx(float((place.sum(dim=-1) == 0).float().mean()), abs=1e-6)


def test_codes_beyond_those_kept_are_none_and_have_a_share(tmp_path: Path) -> None:
    model, film = steered(latent="vq", codebook=6), clips(4)
    found = discover_actions(model, film, most=1)
    actions = torch.stack([cast(Any, model.dynamics.latent).vectors(torch.arange(6))] * 3, dim=1).cpu()
    for back in (found, None):
        if back is None:
            save_model(model, tmp_path / "model", "card")
            save_actions(found, tmp_path / "model")
            back = load_actions(tmp_path)
            assert back is not None
        for slot in range(3):
            numbers = [row[slot] for row in back.numbers(actions)]
            assert sorted(numbers, key=str) == [0] + [None] * 5
            assert back.other(slot) == pytest.approx(1 - float(back.usage[slot][0]), abs=1e-6)
    assert found_in_puppets(WatchedPuppets()).other(0) == 0


def test_they_are_kept_beside_the_model_bit_for_bit(tmp_path: Path) -> None:
    model = steered()
    save_model(model, tmp_path / "model", "card")
    assert load_actions(tmp_path) is None
    found = discover_actions(model, clips(), entities={1: 0})
    save_actions(found, tmp_path / "model")
    back = load_actions(tmp_path)  # a run's folder
    assert back is not None
    for name in ("vectors", "usage", "motion", "consistency"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(found, name), getattr(back, name), strict=True))
    for a, b in zip(found.examples, back.examples, strict=True):
        assert torch.equal(a.actions, b.actions)
        assert torch.equal(a.moves, b.moves)
    assert back.entity == (None, 0, None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content.update(format=9), "format 9"),
        (lambda content: content["slots"][0].pop("usage"), "usage"),
        (lambda content: content["slots"][0].update(usage=[1.0, 2.0, 3.0] * 9), "each code"),
        (lambda content: content.update(slots=3), "no discovered actions"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any, why: str) -> None:
    model = steered()
    save_model(model, tmp_path, "card")
    path = save_actions(discover_actions(model, clips()), tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=why):
        load_actions(tmp_path)
    (tmp_path / ACTIONS_FILE).write_text("{")
    with pytest.raises(DataError, match=r"actions\.json"):
        load_actions(tmp_path)


def test_what_there_is_not_is_named() -> None:
    found = found_in_puppets(WatchedPuppets())
    with pytest.raises(SettingsError, match=r"no slot 2 is among .* They are of slots 0 to 1"):
        found.arrows(2)
    with pytest.raises(SettingsError, match=r"slot 1 has no code 7. Its codes are 0 to 4"):
        found.vector(1, 7)
    with pytest.raises(SettingsError, match="'none' has no latent actions"):
        discover_actions(steered(latent="none"), clips())
    with pytest.raises(DataError, match="no transition"):
        discover_actions(steered(), clips()[:, :1])


def placed(at: tuple[float, float], blocked: tuple[float, float] | None = None) -> Scene:
    """Stands in for a scene of a model whose latent action says which place its slot comes to."""

    def peek(actions: torch.Tensor) -> tuple[None, torch.Tensor]:
        places = actions.clone()
        if blocked is not None:
            stopped = (places[:, 0] - torch.tensor(blocked)).norm(dim=-1) < 1e-3
            places[stopped, 0] = torch.tensor(at)
        return None, places

    return cast(Scene, SimpleNamespace(places=torch.tensor([at]), peek=peek))


def wanderer() -> Examples:
    """Transitions on a grid of 5 x 5 places, but none that goes right from the middle."""
    places, moves = [], []
    for x in range(5):
        for y in range(5):
            for dx, dy in DIRECTIONS.values():
                inside = 0 <= x + dx < 5 and 0 <= y + dy < 5
                if inside and (x, y, dx) != (2, 2, 1):
                    places.append((x / 5, y / 5))
                    moves.append((dx / 5, dy / 5))
    at, by = torch.tensor(places), torch.tensor(moves)
    return Examples(at, by, at + by)


@pytest.mark.parametrize("way", list(DIRECTIONS))
def test_a_slot_goes_where_it_is_sent_even_as_it_was_never_seen_to(way: str) -> None:
    found = directed(placed((0.4, 0.4)), 0, way, wanderer(), torch.zeros(1, 2))
    assert torch.allclose(found.move, torch.tensor(DIRECTIONS[way]) / 5, atol=1e-5)
    assert found.arrives


def test_a_slot_that_cannot_go_stays() -> None:
    for scene in (placed((0.0, 0.4)), placed((0.4, 0.4), blocked=(0.2, 0.4))):
        found = directed(scene, 0, "left", wanderer(), torch.zeros(1, 2))
        assert not found.arrives
        assert found.move.norm() < 1e-3
    with pytest.raises(SettingsError, match=r"'north'. Use one of up, right, down, left, still"):
        directed(placed((0.4, 0.4)), 0, "north", wanderer(), torch.zeros(1, 2))


def test_actions_are_held_against_the_model_that_they_lie_with() -> None:
    found = discover_actions(steered(), clips(), most=3)
    found.check_model(steered(), "here")
    for other in (steered(factors=2), steered(factors=4), steered(factors=1)):
        with pytest.raises(DataError, match=r"actions\.json beside here is of another model: of 3 slots"):
            found.check_model(other, "here")
