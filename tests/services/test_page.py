"""The player's page in a real browser: by mouse and by keys, and each picture is the model's to the last bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Download, Page, sync_playwright

import flam_core
from flam_core.data.manifest import read_manifest
from flam_core.data.quarantine import read_quarantine
from flam_core.evaluation.held_out import held_out_clips
from flam_core.steering.directions import directed
from flam_core.steering.scene import Scene
from services.storage import resolve
from tests.services.player_fixture import NAME, SIZE, SLOTS, STEPS, TOKEN, Played, some_actions

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the start of the player is in the first test's time
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (infra/chromium/install.sh)"),
]
_PIXELS = """(number) => {
  const canvas = document.querySelectorAll('.picture')[number];
  return Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data);
}"""

ALERT = "document.getElementById('status').classList.contains('alert')"
_OPACITY = """([grid, number]) => {
  const canvas = document.querySelectorAll('.overlay')[number];
  const pen = canvas.getContext('2d'), size = canvas.width / grid;
  const middles = Array.from({ length: grid }, (_, i) => Math.floor((i + 0.5) * size));
  return middles.flatMap((y) => middles.map((x) => pen.getImageData(x, y, 1, 1).data[3]));
}"""

_COUNT_SLEEPS = """() => {
  const own = window.setTimeout;
  let sleeps = 0;
  window.mostSleeps = 0; // at a time
  window.setTimeout = (wake, time) => {
    window.mostSleeps = Math.max(window.mostSleeps, ++sleeps);
    return own(() => { --sleeps; wake(); }, time);
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, player: Played) -> Iterator[Page]:
    """Open, at the start of the first scene. Nothing may go wrong in its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    problems: list[str] = []
    opened.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda asked: None if of(player, asked.url) else problems.append(asked.url))
    opened.goto(f"{player.url}?token={TOKEN}")
    at_step(opened, 0)
    assert TOKEN not in opened.url
    yield opened
    session = opened.evaluate("sessionStorage.getItem('flam-session')")
    player.ask("DELETE", f"api/sessions/{session}")
    context.close()
    expected = getattr(opened, "expected_problems", [])
    assert [one for one in problems if not any(part in one for part in expected)] == []


def of(player: Played, url: str) -> bool:
    """Whether it is the server's, or a file that the page has made of its answers."""
    return url.removeprefix("blob:").startswith(player.url)


def at_step(page: Page, step: int) -> None:
    page.wait_for_selector(f"body[data-step='{step}']")


def until(page: Page, true: str, seconds: float = 60) -> None:
    """Playwright's own wait would need `eval`, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(true):
        assert time.monotonic() < deadline, true
        page.wait_for_timeout(30)


def pixels(page: Page, side: int = 0) -> np.ndarray:
    """What is on the canvas: uint8 [H, W, 3]."""
    return np.array(page.evaluate(_PIXELS, side), dtype=np.uint8).reshape(SIZE, SIZE, 4)[..., :3]


def overlay(page: Page, grid: int, side: int = 0) -> np.ndarray:
    """How opaque what lies over a picture is in the middle of each patch: float [P], 0 to 1."""
    return np.array(page.evaluate(_OPACITY, [grid, side])) / 255


def taken(page: Page) -> str | None:
    found = page.locator("#slots button[aria-pressed=true]")
    return found.get_attribute("data-slot") if found.count() else None


def first_clip(player: Played) -> torch.Tensor:
    data = resolve(str(player.data))
    manifest, quarantine = read_manifest(data.fs, data.path), read_quarantine(data.fs, data.path)
    (clip,) = held_out_clips(
        manifest, data.fs, data.path, "test", None, 1, quarantine=quarantine, on_broken=lambda _clip: None
    )
    return torch.from_numpy(clip.frames.copy())


def start(player: Played, number: int) -> tuple[Scene, torch.Tensor]:
    """The first scene by one of the models, and what its slots do in the clip: float32 [T - 1, K, A]."""
    model, clip = flam_core.load(player.models[number]), first_clip(player)
    return Scene(model, clip[:1]), model.infer_actions(model.slots(model.encode(clip[None]))[0])[0]


def test_each_picture_is_the_models_for_the_same_actions(page: Page, player: Played) -> None:
    clip, actions = first_clip(player), some_actions(0)
    scene, video = start(player, 0)
    assert np.array_equal(pixels(page), clip[0].numpy())
    assert np.array_equal(pixels(page, 1), clip[0].numpy())  # the challenger starts from the same

    box = page.locator(".screen").first.bounding_box()
    assert box is not None
    masks = scene.masks
    assert masks is not None
    grid = round(masks.shape[1] ** 0.5)
    patch = int(masks.max(dim=0).values.argmax())  # where there is no doubt
    at = [(number + 0.5) / grid for number in (patch % grid, patch // grid)]
    assert not overlay(page, grid).any()
    page.mouse.move(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    slot = int(masks[:, patch].argmax())
    shown, meant = overlay(page, grid), masks[slot].numpy()
    assert shown[patch] > 0
    assert np.abs(shown - 0.55 * meant).max() < 0.02  # each patch as far as the slot claims it; outlines run between
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 30)
    assert not overlay(page, grid).any()
    page.mouse.click(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    assert taken(page) == str(slot)

    for step, (key, meant) in enumerate([("ArrowUp", "up"), ("3", 2), ("ArrowLeft", "left"), (".", "still")]):
        page.keyboard.press(key)
        at_step(page, step + 1)
        chosen = video[step].clone()
        if isinstance(meant, int):
            chosen[slot] = actions.vectors[slot][meant]
        else:
            chosen[slot] = directed(scene, slot, meant, actions.examples[slot], chosen).action
        assert np.array_equal(pixels(page), scene.step(chosen).numpy()), key


def test_both_models_play_side_by_side(page: Page, player: Played) -> None:
    scene, video = start(player, 2)
    first, second = (page.locator(".side").nth(side) for side in range(2))
    left, right = first.bounding_box(), second.bounding_box()
    assert left is not None
    assert right is not None
    assert right["x"] >= left["x"] + left["width"]
    assert (right["y"], right["width"], right["height"]) == (left["y"], left["width"], left["height"])
    assert first.locator("figcaption").inner_text() == f"{NAME}@champion, version 1"
    assert second.locator("figcaption").inner_text() == f"challenger: {player.models[2]}"
    assert page.get_by_role("img", name="as the challenger draws it").count() == 1

    masks = scene.masks
    assert masks is not None
    grid = round(masks.shape[1] ** 0.5)
    page.hover("#slots button >> nth=1")
    assert overlay(page, grid).any()
    assert overlay(page, grid, 1).any()  # of the slot that is in the same place
    page.click("#slots button >> nth=1")
    page.keyboard.press("3")
    at_step(page, 1)
    session = page.evaluate("sessionStorage.getItem('flam-session')")
    slot = player.ask("GET", f"api/sessions/{session}").json()["sides"][1]["slot"]
    chosen = video[0].clone()
    chosen[slot] = some_actions(2).vectors[slot][2]  # its own code of the same motion
    assert np.array_equal(pixels(page, 1), scene.step(chosen).numpy())
    assert not np.array_equal(pixels(page, 1), pixels(page))  # another model, another picture


def test_keys_alone_are_enough(page: Page) -> None:
    before = pixels(page)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.slot") == "1":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert taken(page) == "1"
    page.keyboard.press("ArrowRight")
    at_step(page, 1)
    first = pixels(page)
    assert not np.array_equal(first, before)
    page.keyboard.press("ArrowDown")
    at_step(page, 2)
    second = pixels(page)
    for key in ("Backspace", "u", "Control+z"):
        page.keyboard.press(key)
        at_step(page, 1)
        assert np.array_equal(pixels(page), first), key
        page.keyboard.press("ArrowDown")
        at_step(page, 2)
        assert np.array_equal(pixels(page), second), key
    page.keyboard.press("o")
    assert page.locator("#others [aria-pressed=true]").get_attribute("data-others") == "prior"
    page.keyboard.press("r")
    at_step(page, 0)
    assert np.array_equal(pixels(page), before)
    assert page.evaluate("document.activeElement.dataset.slot") == "1"  # the focus is where it was
    page.keyboard.press("n")
    until(page, "document.getElementById('status').textContent.startsWith('Scene 2 ')")  # said when it is drawn
    assert not np.array_equal(pixels(page), before)
    page.keyboard.press("Escape")
    assert taken(page) is None
    page.keyboard.press("ArrowUp")
    until(page, "document.getElementById('status').textContent.startsWith('Take a slot')")
    names = page.evaluate("[...document.querySelectorAll('button')].map(b => b.ariaLabel || b.textContent.trim())")
    assert all(names)


def test_it_runs_records_and_comes_back(page: Page, player: Played) -> None:
    page.keyboard.press("g")
    page.keyboard.press("p")
    until(page, "Number(document.body.dataset.step) >= 5")
    page.keyboard.press("p")
    until(page, "document.getElementById('run').ariaPressed === 'false'")
    until(page, "document.body.ariaBusy === 'false'")
    step = int(page.evaluate("document.body.dataset.step"))
    with page.expect_download() as saved:
        page.keyboard.press("g")
    with Image.open(io.BytesIO(saved.value.path().read_bytes())) as image:
        assert image.format == "GIF"
        assert getattr(image, "n_frames", 1) == step + 1
        assert image.size == (2 * 288 + 12, 288)  # both models
    files: list[Download] = []
    page.on("download", lambda file: files.append(file))  # a method of a list it cannot take
    page.click("#actions")
    until(page, "document.getElementById('status').textContent === 'actions.json and actions-challenger.json saved.'")
    while len(files) < 2:
        page.wait_for_timeout(50)
    assert [file.suggested_filename for file in files] == ["actions.json", "actions-challenger.json"]
    records = [json.loads(file.path().read_text()) for file in files]
    assert [len(record["films"][0]["actions"]) for record in records] == [step, step]
    assert [record["model"] for record in records] == [f"models:/{NAME}/1", str(player.models[2])]
    before = pixels(page)
    page.reload()
    at_step(page, step)  # the scene is kept for the tab
    assert np.array_equal(pixels(page), before)


def test_pause_and_run_at_once_is_one_run(page: Page) -> None:
    page.evaluate(_COUNT_SLEEPS)
    page.evaluate("for (let times = 0; times < 3; times++) document.getElementById('run').click()")  # run, pause, run
    until(page, "Number(document.body.dataset.step) >= 4")
    page.evaluate("window.mostSleeps = 0")  # by now, the first has woken and should have ended
    until(page, "Number(document.body.dataset.step) >= 9")
    page.keyboard.press("p")
    assert page.evaluate("window.mostSleeps") == 1
    assert page.locator("#run").get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("keys", [".", "gg"])
def test_a_scene_that_has_ended_is_begun_anew(page: Page, player: Played, keys: str) -> None:
    page.expected_problems = ["404"]  # type: ignore[attr-defined] - the browser logs each
    session = page.evaluate("sessionStorage.getItem('flam-session')")
    assert player.ask("DELETE", f"api/sessions/{session}").status_code == 204
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_selector("#gone[open]")
    assert "left alone" in page.locator("#gone-why").inner_text()
    page.keyboard.press("Enter")
    until(page, f"!['{session}', null].includes(sessionStorage.getItem('flam-session'))")
    at_step(page, 0)
    assert page.locator("#record").get_attribute("aria-pressed") == "false"
    page.keyboard.press(".")
    at_step(page, 1)


def test_what_the_server_refuses_is_said(page: Page) -> None:
    page.expected_problems = ["422"]  # type: ignore[attr-defined] - the browser logs each
    page.keyboard.press("p")
    until(page, ALERT, seconds=240)
    assert (
        page.locator("#status").inner_text() == f"the scene has taken its {STEPS} steps. Take some back, or reset it."
    )
    until(page, "document.getElementById('run').ariaPressed === 'false'")
    page.keyboard.press("Backspace")
    at_step(page, STEPS - 1)
    assert not page.evaluate(ALERT)
    page.keyboard.press(".")
    at_step(page, STEPS)


def test_a_server_that_does_not_answer_is_said(page: Page) -> None:
    page.expected_problems = ["ERR_INTERNET_DISCONNECTED"]  # type: ignore[attr-defined] - as above
    page.context.set_offline(True)
    page.keyboard.press(".")
    until(page, ALERT)
    assert page.locator("#status").inner_text() == "The server does not answer. Is it still running?"
    assert page.evaluate("document.body.dataset.step") == "0"
    page.context.set_offline(False)
    page.keyboard.press(".")
    at_step(page, 1)
    assert not page.evaluate(ALERT)


@pytest.mark.parametrize("button", ["#retry", "#start button"])
def test_a_full_server_leaves_a_way_in(page: Page, player: Played, button: str) -> None:
    page.expected_problems = ["503"]  # type: ignore[attr-defined] - the browser logs each
    mine = page.evaluate("sessionStorage.getItem('flam-session')")
    others = [player.ask("POST", "api/sessions", json={}).json()["session"] for _ in range(3)]
    assert page.locator("#retry").is_hidden()
    page.evaluate("sessionStorage.clear()")
    page.reload()
    page.wait_for_selector("#retry:visible")
    assert "all 4 places" in page.locator("#status").inner_text()
    for key in ("r", "p", ".", "Backspace"):
        page.keyboard.press(key)
    page.click("#undo")
    assert player.ask("DELETE", f"api/sessions/{mine}").status_code == 204
    page.click(button)
    at_step(page, 0)
    assert page.locator("#retry").is_hidden()
    page.keyboard.press(".")
    at_step(page, 1)
    for other in others:
        player.ask("DELETE", f"api/sessions/{other}")


def test_nothing_moves_and_the_api_is_described(page: Page, player: Played) -> None:
    def places() -> Any:
        return page.evaluate(
            "[...document.querySelectorAll('.screen, #transport, #codes, #others, #start')].map(e => {"
            " const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height].map(Math.round); })"
        )

    before = places()
    page.click("#slots button >> nth=0")
    page.keyboard.press("2")
    at_step(page, 1)
    assert places() == before
    page.goto(f"{player.url}docs.html")
    page.wait_for_selector("article")
    assert page.locator("article").count() == 13
    assert "/api/rollout" in page.locator("#operations").inner_text()
    page.goto(player.url)
    at_step(page, 1)
    assert len(page.query_selector_all("#slots button")) == SLOTS
