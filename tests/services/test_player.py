"""The player's API on a real Ray Serve: what it gives, what it refuses, and that it stays up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

import flam_core
from flam_core.steering import generate
from flam_core.steering.discovered import load_actions
from services.player.wire import frames_from_text, frames_to_text
from tests.services.conftest import environment, free_ports, run_job, said
from tests.services.player_fixture import NAME, SIZE, SLOTS, TOKEN, Played, some_actions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # its start is in the first test's time
FUZZ = 15
"""Examples of each operation, well-formed and not."""


def clip(frames: int = 5, seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def fine(answer: requests.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()


def begin(player: Played, **start: int) -> dict[str, Any]:
    return fine(player.ask("POST", "api/sessions", json=start), 201)


def end(player: Played, scene: dict[str, Any]) -> None:
    assert player.ask("DELETE", f"api/sessions/{scene['session']}").status_code == 204


def test_it_tells_what_it_serves(player: Played) -> None:
    about = fine(player.ask("GET", "api"))
    assert about["model"]["version"] == "1"
    assert about["model"]["frame_size"] == SIZE
    assert [slot["entity"] for slot in about["model"]["slots"]] == [0, None, 1]
    assert about["model"]["slots"][0]["arrows"] == ["up", "right", "down", "left", "still"]
    paths = fine(player.ask("GET", "openapi.json"))["paths"]
    assert {"/api/infer", "/api/rollout", "/api/edit", "/api/sessions/{name}/step"} <= set(paths)


def test_who_has_no_token_gets_nothing_but_health(player: Played) -> None:
    assert fine(player.ask("GET", "health", token=None)) == {"status": "ok"}
    for path in ("", "api", "openapi.json", "main.js", "api/sessions/x"):
        refused = player.ask("GET", path, token="another-token-of-length")
        assert refused.status_code == 401, path
        assert refused.json()["fix"]
    let_in = player.ask("GET", f"?token={TOKEN}", token=None)
    assert let_in.status_code == 303
    cookie = {"Cookie": let_in.headers["set-cookie"].partition(";")[0]}
    assert fine(player.ask("GET", "api", token=None, headers=cookie))["model"]["address"] == f"models:/{NAME}@champion"


def test_infer_rollout_and_edit_are_the_models(player: Played) -> None:
    model, sent = flam_core.load(player.models[0]), clip()
    found = fine(player.ask("POST", "api/infer", json={"frames": frames_to_text(sent)}))
    slots = model.slots(model.encode(torch.from_numpy(sent[None])))[0]
    actions = model.infer_actions(slots)
    assert np.array_equal(np.float32(found["actions"]), actions[0].numpy())
    assert found["codes"] == some_actions(0).nearest(actions[0]).tolist()

    body = {"frames": frames_to_text(sent[:1]), "actions": found["actions"]}
    drawn = fine(player.ask("POST", "api/rollout", json=body))
    wanted = (model.rollout(torch.from_numpy(sent[None, :1]), actions, "frames")[0] * 255).round().to(torch.uint8)
    assert np.array_equal(frames_from_text(drawn["frames"], 16), wanted.numpy())

    put = {"kind": "prior", "seed": 3}
    edited = fine(player.ask("POST", "api/edit", json={"frames": frames_to_text(sent), "slot": 1, "put": put}))
    film = generate.edit(model, torch.from_numpy(sent), 1, 4, 1, generate.prior(3), feedback="frames")
    assert np.array_equal(frames_from_text(edited["frames"], 16), film.frames.numpy())
    assert np.array_equal(np.float32(edited["actions"]), film.actions.numpy())


def test_requests_that_come_at_once_go_together_or_are_told_to_come_again(player: Played) -> None:
    def infer(number: int) -> requests.Response:
        return player.ask("POST", "api/infer", json=sent[number])

    sent = [{"frames": frames_to_text(clip(16, seed))} for seed in range(48)]
    alone = [fine(infer(number)) for number in range(48)]
    actions = np.float32([one["actions"] for one in alone])
    apart = np.abs(actions[:, None] - actions).max(axis=(2, 3, 4)) + np.eye(48)
    assert apart.min() > 0.01  # so that another's answer would be seen
    with ThreadPoolExecutor(25) as pool:
        waiting = [pool.submit(infer, number) for number in range(48)]
        healthy: list[int] = []
        while not all(one.done() for one in waiting):
            healthy.append(player.ask("GET", "health").status_code)
        answers = [one.result() for one in waiting]
    by_status = {status: [one for one in answers if one.status_code == status] for status in (200, 503)}
    assert sum(map(len, by_status.values())) == 48
    assert by_status[200]
    for number, answer in enumerate(answers):
        if answer.status_code == 200:  # batches differ in the last bits, requests do not mix
            assert np.abs(np.float32(answer.json()["actions"]) - actions[number]).max() < 1e-4, number
    for refused in by_status[503]:
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == "the server is busy"
    assert set(healthy) == {200}  # a busy server is a healthy one


@pytest.mark.parametrize(
    ("path", "body", "status", "what"),
    [
        ("infer", {"frames": frames_to_text(clip(17))}, 422, "16 are the limit"),
        ("infer", {"frames": frames_to_text(clip(2, size=16))}, 422, "16x16 pixels"),
        ("infer", {"frames": frames_to_text(clip(1))}, 422, "body.frames"),
        ("infer", {"frames": ["AAAA", "AAAA"]}, 422, "not a PNG"),
        ("rollout", {"frames": frames_to_text(clip(1)), "actions": [[[0.0]]]}, 422, "[1, 1, 1]"),
        ("rollout", {"frames": frames_to_text(clip(1)), "actions": [[[0.0], [0.0, 1.0]]]}, 422, "different lengths"),
        ("rollout", {"frames": frames_to_text(clip(3)), "actions": [[[0.0] * 4] * SLOTS] * 2}, 422, "0 steps"),
        ("edit", {"frames": frames_to_text(clip()), "slot": 3, "put": {"kind": "prior"}}, 422, "slot 3"),
        ("edit", {"frames": frames_to_text(clip()), "slot": 0, "put": {"kind": "code", "code": 9}}, 422, "no code 9"),
        (
            "edit",
            {"frames": frames_to_text(clip()), "slot": 0, "put": {"kind": "actions", "actions": [[0.0] * 4] * 3}},
            *(422, "the clip needs [4, 4]"),
        ),
        ("infer", {"frames": ["A" * 1_100_000] * 2}, 413, "more than 1 MB"),
        ("sessions/none/step", {}, 404, "no such scene"),
    ],
)
def test_bad_input_is_one_clear_error(player: Played, path: str, body: dict, status: int, what: str) -> None:
    refused = player.ask("POST", f"api/{path}", json=body)
    assert refused.status_code == status, refused.text
    assert set(refused.json()) == {"error", "fix"}
    assert what in refused.json()["error"]


def test_what_is_no_http_is_refused_in_plain_text(player: Played) -> None:
    address = urlsplit(player.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as sent:
        sent.sendall(b"this is no request\r\n\r\n")
        said = sent.recv(4096)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: text/plain" in said


def test_a_played_scene_is_what_generate_makes_of_its_actions(player: Played, tmp_path: Path) -> None:
    scene = begin(player, clip=1, seed=4)
    path, shown = f"api/sessions/{scene['session']}", []
    for body in ({"slot": 0, "arrow": "up"}, {"slot": 1, "code": 2, "others": "prior"}, {}):
        sides = fine(player.ask("POST", f"{path}/step", json=body))["sides"]
        shown.append([side["frame"] for side in sides])
    # The champion as it was named at the time: the alias may have moved on since.
    named = (f"models:/{NAME}/1", str(player.models[2]))
    for side, model in enumerate((player.models[0], player.models[2])):
        kept, out = tmp_path / f"side{side}" / "actions.json", tmp_path / f"out{side}"
        kept.parent.mkdir()
        kept.write_bytes(player.ask("GET", f"{path}/actions.json?side={side}").content)
        record = json.loads(kept.read_text())
        assert record["source"]["clip"].startswith(str(player.data))
        assert record["model"] == named[side]
        words = ["generate", str(model), "--mode", "replay", "--actions", str(kept), "--data", str(player.data)]
        done = run_job([*words, "--clip_index", "1", "--out", str(out)], environment(), tmp_path)
        assert done.returncode == 0, said(done)
        frames = np.load(out / "frames.npz")["film_0"]
        assert np.array_equal(frames, frames_from_text([step[side] for step in shown], 16))
    end(player, scene)
    gone = player.ask("GET", path)
    assert gone.status_code == 404
    assert gone.json()["fix"] == "Begin another."


@pytest.mark.parametrize(
    ("method", "path", "body", "what"),
    [
        ("POST", "step", {"slot": SLOTS, "code": 0}, "slot 3"),
        ("POST", "step", {"slot": 0, "code": 9}, "no code 9"),
        ("POST", "step", {"code": 1}, "no slot to take it"),
        ("POST", "step", {"slot": 0, "code": 1, "arrow": "up"}, "both a code and an arrow"),
        ("POST", "step", {"slot": 0, "arrow": "north"}, "body.arrow"),
        ("POST", "step", {"slot": -1}, "body.slot"),
        ("POST", "step", {"slot": "0"}, "body.slot"),
        ("POST", "step", {"more": 1}, "body.more"),
        ("POST", "undo", None, "no step to take back"),
        ("POST", "reset", {"seed": -1}, "body.seed"),
        ("GET", "film.gif?since=9", None, "begins at 9"),
        ("GET", "actions.json", None, "no step was taken"),
        ("GET", "actions.json?side=2", None, "query.side"),
    ],
)
def test_what_a_scene_cannot_do_leaves_it_as_it_was(
    player: Played, method: str, path: str, body: dict | None, what: str
) -> None:
    scene = begin(player)
    refused = player.ask(method, f"api/sessions/{scene['session']}/{path}", json=body)
    assert refused.status_code == 422, refused.text
    assert set(refused.json()) == {"error", "fix"}
    assert what in refused.json()["error"]
    assert fine(player.ask("GET", f"api/sessions/{scene['session']}")) == scene
    end(player, scene)


def test_there_is_room_for_so_many_scenes(player: Played) -> None:
    scenes = [begin(player) for _ in range(4)]
    refused = player.ask("POST", "api/sessions", json={})
    assert refused.status_code == 503
    assert "all 4 places" in refused.json()["error"]
    for scene in scenes:
        end(player, scene)
    end(player, begin(player))


def test_a_moved_alias_is_followed_and_running_scenes_keep_their_model(player: Played) -> None:
    scene = begin(player)
    path = f"api/sessions/{scene['session']}"
    try:
        player.champion("2")
        until_all_serve(player, "2")
        moved = fine(player.ask("POST", f"{path}/step", json={"slot": 0, "code": 1}))
        assert moved["newest"] == "2"
        kept = json.loads(player.ask("GET", f"{path}/actions.json").content)
        actions = load_actions(player.models[0])
        assert actions is not None
        assert np.array_equal(np.float32(kept["films"][0]["actions"][0][0]), actions.vectors[0][1].numpy())
        anew = fine(player.ask("POST", f"{path}/reset", json={}))
        assert anew["models"][0]["version"] == "2"
        assert anew["session"] == scene["session"]
    finally:
        player.champion("1")
        end(player, scene)
    until_all_serve(player, "1")


def until_all_serve(player: Played, version: str) -> None:
    """The process with the scenes, and the one that answers the API: each follows the alias by itself."""
    sent, deadline = {"frames": frames_to_text(clip(2))}, time.monotonic() + 120
    while {
        fine(player.ask("GET", "api"))["model"]["version"],
        fine(player.ask("POST", "api/infer", json=sent))["version"],
    } != {version}:
        assert time.monotonic() < deadline
        time.sleep(0.3)


PICTURES = st.integers(2, 6).flatmap(
    lambda count: st.integers(0, 99).map(lambda seed: frames_to_text(clip(count, seed)))
)
"""Clips of the size that the model takes."""
WIDTH = st.floats(-3, 3, width=32)
PUTS = st.one_of(
    st.integers(0, 6).map(lambda code: {"kind": "code", "code": code}),
    st.sampled_from(["up", "right", "down", "left", "still"]).map(lambda way: {"kind": "arrow", "arrow": way}),
    st.integers(0, 2**53 - 1).map(lambda seed: {"kind": "prior", "seed": seed}),
    st.lists(st.lists(WIDTH, min_size=4, max_size=4), min_size=1, max_size=6).map(
        lambda actions: {"kind": "actions", "actions": actions}
    ),
)
TRANSITION = st.lists(st.lists(WIDTH, min_size=4, max_size=4), min_size=SLOTS, max_size=SLOTS)
FITTING = {
    "/api/infer": st.fixed_dictionaries({"frames": PICTURES}),
    "/api/rollout": st.fixed_dictionaries(
        {"frames": PICTURES, "actions": st.lists(TRANSITION, min_size=4, max_size=9)},
        optional={"feedback": st.sampled_from(["frames", "slots"])},
    ),
    "/api/edit": st.fixed_dictionaries({"frames": PICTURES, "slot": st.integers(0, SLOTS), "put": PUTS}),
}
"""Bodies with real pictures, of which many can be done: from the schema alone come none."""


@pytest.mark.parametrize("path", FITTING)
def test_what_fits_the_model_is_done_and_answered_as_described(player: Played, path: str) -> None:
    schema = schemathesis.openapi.from_dict(fine(player.ask("GET", "openapi.json")))
    operation = schema[path]["POST"]
    statuses: set[int] = set()

    @settings(
        max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    @given(body=FITTING[path])
    def fits(body: dict[str, Any]) -> None:
        case = operation.Case(body=body, media_type="application/json")
        answer = case.call(base_url=player.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 422), answer.text
        case.validate_response(answer, checks=[response_schema_conformance, status_code_conformance])

    fits()
    assert 200 in statuses


def test_no_request_brings_it_down(player: Played) -> None:
    schema = schemathesis.openapi.from_dict(fine(player.ask("GET", "openapi.json")))
    scene = begin(player)
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE)

        @settings(
            max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
        )
        @given(case=strategy)
        def fuzz(case: schemathesis.Case) -> None:
            if case.method.upper() != "DELETE" and "name" in case.path_parameters:
                case.path_parameters["name"] = scene["session"]
            answer = case.call(base_url=player.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)
            statuses.setdefault(case.operation.label, set()).add(answer.status_code)
            # 503: the places of the server are all taken, which is no fault.
            assert answer.status_code < 500 or answer.status_code == 503, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()) == {"error", "fix"}
            case.validate_response(answer, checks=[response_schema_conformance, status_code_conformance])
            if case.operation.label == "POST /api/sessions" and answer.status_code == 201:
                end(player, answer.json())

        fuzz()
    end(player, scene)
    assert len(statuses) == 13
    assert {200, 422} <= statuses["POST /api/sessions/{name}/step"]
    assert player.ask("GET", "health").status_code == 200


def test_what_is_no_model_of_flam_ends_with_one_line(player: Played, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (port,) = free_ports(1)
    words = [sys.executable, "jobs/play.py", str(tmp_path / "model"), "--data", str(player.data), "--port", str(port)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(words, cwd=root, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 4, said(done)
    errors = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert len(errors) == 1
    assert "model.safetensors is missing" in errors[0]
