"""The action microscope: a page that needs nothing beside it, stays light, and shows what slots do."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from flam_core.model import Flam
from flam_core.steering.discovered import discover_actions
from flam_core.steering.microscope import microscope
from flam_core.steering.scene import Scene
from flam_core.steering.traversals import STEPS, traverse
from tests.steering_fixture import clips, steered

METRICS = {
    **{f"slots/{k}/used": float(k < 2) for k in range(3)},
    **{f"slots/{k}/effect_db": 1.5 for k in range(3)},
    "leakage": 0.25,
    "leakage@0": 0.125,
    "leakage/in_mask": 0.5,
    "leakage/0/in_mask": 0.625,
    "leakage/1/in_mask": 0.375,
}


def page_of(model: Flam, title: str = "a title") -> str:
    found = discover_actions(model, clips(), entities={1: 0}, most=3)
    return microscope(model, found, clips(), METRICS, title)


@pytest.mark.parametrize("options", [{}, {"latent": "vq", "codebook": 4}, {"state": "patches"}])
def test_every_code_has_its_film_and_nothing_is_fetched(options: dict[str, object]) -> None:
    model = steered(**options)
    page = page_of(model, "<b>flam-grid</b> & co")
    assert "&lt;b&gt;flam-grid&lt;/b&gt; &amp; co" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "://" not in page
    assert "url(" not in page.replace("url(data:image/png;base64,", "")
    found = discover_actions(model, clips(), entities={1: 0}, most=3)
    for slot, vectors in enumerate(found.vectors):
        assert f'id="slot-{slot}"' in page
        for code in range(len(vectors)):
            rule = re.search(rf"\.s{slot}-{code} {{ background-image: url\(data:image/png;base64,([^)]+)\)", page)
            assert rule
            with Image.open(io.BytesIO(base64.b64decode(rule[1]))) as sprite:
                assert sprite.size == (48 * (STEPS + 1), 48 * 3)
    assert page.count("<details>") == 1  # the slot that is not in use


def test_leakage_is_told_of_each_slot_by_its_entity_and_by_its_mask() -> None:
    page = page_of(steered())
    assert "25.0% lies beyond its entity" in page
    assert "50.0% of the change lies beyond the patches that its slot claims" in page
    heads = re.findall(r"<th>(.*?)</th>", page)
    rows = {k: re.findall(r"<td>(.*?)</td>", row) for k, row in enumerate(re.findall(r"<tr>(<td>.*?)</tr>", page))}
    columns = [heads.index(name) for name in ("Leakage, by entity", "Leakage, by mask")]
    shown = {k: [row[column] for column in columns] for k, row in rows.items()}
    # Slot 1 is that of entity 0, and slot 2 changes nothing.
    assert shown == {0: ["-", "62.5%"], 1: ["12.5%", "37.5%"], 2: ["-", "-"]}
    sections = dict(re.findall(r'<section id="slot-(\d)">(.*?)</section>', page, re.DOTALL))
    assert "changes: 62.5% beyond what its mask claims." in sections["0"]
    assert "changes: 12.5% beyond its entity, 37.5% beyond what its mask claims." in sections["1"]
    assert "Leakage" not in sections["2"]


def test_pictures_are_shrunk_until_the_page_is_light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flam_core.steering.microscope._WEIGHT", 150_000)
    page = page_of(steered())
    pictures = re.findall(r"\{ background-image: url\(data:image/png;base64,([^)]+)\)", page)
    assert sum(map(len, pictures)) <= 150_000
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as sprite:
        side = sprite.width // (STEPS + 1)
        assert side == 16
        assert sprite.height == 3 * side


def test_a_traversal_is_what_a_scene_gives_for_the_same_code() -> None:
    """All slots but the one stand still by what they did; with a single slot there are none, and films must agree."""
    model, film = steered(factors=1), clips()
    found = discover_actions(model, film, most=2)
    scenes = film[:2, :1]
    for one in traverse(model, found, scenes, []):
        assert one.code >= 0
        for number, start in enumerate(scenes):
            scene = Scene(model, start)
            drawn = [scene.step(found.vector(0, one.code)[None]) for _ in range(STEPS)]
            assert np.array_equal(one.frames[number, 0], start[0].numpy())
            apart = np.abs(one.frames[number, 1:].astype(int) - torch.stack(drawn).numpy())
            assert np.quantile(apart, 0.99) <= 1  # many at a time are not rounded as one is


def test_slots_in_use_are_sent_all_four_ways() -> None:
    model, film = steered(), clips()
    found = discover_actions(model, film, most=2)
    films = traverse(model, found, film[:2, :1], [1])
    ways = [(one.slot, one.done) for one in films if one.code < 0]
    assert ways == [(1, way) for way in ("up", "right", "down", "left")]
    assert all(0 <= one.arrived <= 1 for one in films)
    assert all(one.frames.shape == (2, 1 + STEPS, 48, 48, 3) for one in films)
