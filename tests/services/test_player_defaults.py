"""A player that is told no more than its model: whom it lets in, what the documents' client gets, when a scene ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from services.player.wire import frames_from_text
from tests.docs.commands import Block, blocks
from tests.services.conftest import environment, free_ports, said
from tests.services.player_fixture import MODEL, SIZE, SLOTS, save_small_model, small_grid, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each player's start is in a test's time
IDLE_SECONDS = 8
WRITTEN = "http://127.0.0.1:8000/"
"""Where the documents' player answers."""
CLIENTS = [block for block in blocks() if block.language == "python" and "requests.post" in block.body]


def ask(method: str, address: str, **given: Any) -> requests.Response:
    """A request, straight to the server."""
    return requests.request(method, address, timeout=120, proxies={"http": ""}, allow_redirects=False, **given)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a data set."""
    folder = tmp_path_factory.mktemp("defaults")
    save_small_model(folder / "model", 0)
    small_grid(folder / "grid")
    return folder


# First, so that there are never two players at once.
def test_who_comes_from_elsewhere_needs_the_token_that_was_printed(place: Path) -> None:
    (port,) = free_ports(1)
    options = {"--data": place / "grid", "--host": "0.0.0.0", "--port": port}
    with started(place, place / "model", options) as link:
        url, _, token = link.partition("?token=")
        assert url == f"http://127.0.0.1:{port}/"
        assert len(token) >= 32
        for path in ("", "?token=x", "api", "openapi.json", "api/sessions/x"):
            for headers in ({}, {"Authorization": f"Bearer {token}x"}):
                refused = ask("GET", url + path, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer"), path
                assert set(refused.json()) == {"error", "fix"}
        assert ask("GET", f"{url}api", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert ask("GET", f"{url}health").json() == {"status": "ok"}
        let_in = ask("GET", link)
        assert let_in.status_code == 303
        cookie = {"Cookie": let_in.headers["set-cookie"].partition(";")[0]}
        assert ask("GET", url, headers=cookie).status_code == 200
    assert token not in (place / "log").read_text().replace(link, "")


@pytest.fixture(scope="module")
def here(place: Path) -> Iterator[str]:
    """The address of a player for this machine alone."""
    (port,) = free_ports(1)
    options = {"--data": place / "grid", "--port": port, "--limits.idle_seconds": IDLE_SECONDS}
    with started(place, place / "model", options) as link:
        yield link


def test_on_this_machine_there_is_no_token_but_names_are_looked_at(here: str) -> None:
    assert "token" not in here
    assert ask("GET", f"{here}api").json()["model"]["frame_size"] == SIZE
    refused = ask("GET", f"{here}api", headers={"Host": "evil.example"})
    assert refused.status_code == 403
    assert "--allow_host" in refused.json()["fix"]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_the_documents_client_of_five_lines_works(here: str, client: Block, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(10):
        frame = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    assert len(list(filter(str.strip, client.body.splitlines()))) == 5
    assert WRITTEN in client.body
    program = client.body.replace(WRITTEN, here) + "\nimport json\nprint(json.dumps([found, edited]))\n"
    words = [sys.executable, "-c", program]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, said(done)
    found, edited = json.loads(done.stdout)
    assert np.shape(found["actions"]) == (9, SLOTS, MODEL.action_dim)
    assert np.shape(found["codes"]) == (9, SLOTS)
    assert frames_from_text(edited, 9, SIZE).shape == (9, SIZE, SIZE, 3)


def test_readme_and_page_both_have_that_client() -> None:
    assert [client.document for client in CLIENTS] == ["README.md", "docs/play.md"]


def test_a_scene_that_is_left_alone_ends_and_says_so(here: str) -> None:
    begun = ask("POST", f"{here}api/sessions", json={})
    assert begun.status_code == 201
    scene = f"{here}api/sessions/{begun.json()['session']}"
    assert ask("POST", f"{scene}/step", json={}).status_code == 200
    time.sleep(IDLE_SECONDS + 1)
    described = ask("GET", f"{here}openapi.json").json()["paths"]
    for method, path, body in (
        ("GET", "", None),
        ("POST", "/step", {}),
        ("POST", "/undo", None),
        ("POST", "/reset", {}),
        ("GET", "/film.gif", None),
        ("GET", "/actions.json", None),
        ("DELETE", "", None),
    ):
        refused = ask(method, scene + path, json=body)
        assert refused.status_code == 404, path
        assert set(refused.json()) == {"error", "fix"}
        assert f"left alone for {IDLE_SECONDS} s" in refused.json()["error"]
        assert refused.json()["fix"] == "Begin another."
        assert "404" in described["/api/sessions/{name}" + path][method.lower()]["responses"]
    assert ask("POST", f"{here}api/sessions", json={}).status_code == 201
