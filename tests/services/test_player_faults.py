"""What the player answers when something of its own is wrong: JSON with the reason, and no internals. Ray Serve, and
the processes behind it, are stand-ins here."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from flam_core.errors import DataError, EnvironmentFault, pack
from services.player import app, deployments
from services.player.app import make_app
from services.player.deployments import Inference, Scenes
from services.player.guard import Access
from services.player.settings import PlayerSettings
from services.player.wire import OpenBody, frames_to_text
from tests.services.player_fixture import SIZE, SLOTS
from tests.services.test_player_sessions import CLIPS

SETTINGS = PlayerSettings(model="model", data="data")
Answer = Callable[..., Any]


class Process:
    """A deployment's handle: every method gives, or raises, what it is told to."""

    def __init__(self, answer: Answer, ready: str | None = None) -> None:
        async def remote(*given: object) -> Any:
            return answer(*given)

        async def told() -> str | None:
            return ready

        self.told, self.remote = SimpleNamespace(remote=told), SimpleNamespace(remote=remote)

    def __getattr__(self, name: str) -> Any:
        return self.told if name == "ready" else self.remote


def ask(path: str, body: object = None, *, scenes: Process, inference: Process) -> tuple[int, dict[str, Any]]:
    """The status and the JSON that the app answers with."""
    made = make_app(SETTINGS, Access(None, None), scenes, inference)
    sent: list[dict[str, Any]] = []
    content = b"" if body is None else json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "GET" if body is None else "POST", "path": path, "raw_path": path.encode()},
        **{"query_string": b"", "headers": [(b"content-type", b"application/json")], "scheme": "http"},
        **{"asgi": {"version": "3.0"}, "http_version": "1.1", "root_path": "", "server": ("x", 1), "client": ("y", 2)},
    }
    asyncio.run(made(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(one.get("body", b"") for one in sent[1:]))


def raising(error: Exception) -> Answer:
    def answer(*_: object) -> Any:
        raise error

    return answer


FINE = Process(lambda *_: None)
FRAMES = frames_to_text(CLIPS[0].frames[:2])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DeploymentUnavailableError(DeploymentID("Inference", "flam-player")), 503),
        (RayTaskError("infer", "Traceback: /secret/place", ZeroDivisionError("/secret")), 500),
        (RuntimeError("/secret"), 500),
    ],
)
def test_what_goes_wrong_inside_is_json_without_internals(error: Exception, status: int) -> None:
    process = Process(raising(error))
    for path, body in (("/api", None), ("/api/infer", {"frames": FRAMES}), ("/api/sessions", {})):
        answered, said = ask(path, body, scenes=process, inference=process)
        assert answered == status
        assert set(said) == {"error", "fix"}
        assert "secret" not in json.dumps(said)


def test_frames_are_not_decoded_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[threading.Thread] = []

    def decode(*_: object) -> np.ndarray:
        where.append(threading.current_thread())
        return CLIPS[0].frames

    monkeypatch.setattr(app, "frames_from_text", decode)
    found = np.zeros((1, SLOTS, 4), dtype=np.float32), np.zeros((1, SLOTS), dtype=np.int64), None
    inference = Process(lambda *given: found if given else SIZE)
    assert ask("/api/infer", {"frames": FRAMES}, scenes=FINE, inference=inference)[0] == 200
    assert where[0] is not threading.main_thread()


def test_health_tells_of_a_process_that_could_not_start() -> None:
    failed = Process(lambda *_: None, pack(DataError("model.safetensors is missing", fix="Train it.")))
    for scenes, inference in ((failed, FINE), (FINE, failed)):
        status, said = ask("/health", scenes=scenes, inference=inference)
        assert (status, said["fix"]) == (503, "Train it.")
        assert "model.safetensors is missing" in said["error"]
    assert ask("/health", scenes=FINE, inference=FINE) == (200, {"status": "ok"})


@pytest.mark.parametrize("kind", [Scenes, Inference])
def test_a_process_without_a_model_says_why_and_is_started_again(
    kind: type[Scenes] | type[Inference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = kind(PlayerSettings(model=str(tmp_path), data="nowhere"), "")
    assert asyncio.run(process.ready())
    process.check_health()  # whoever started it hears first
    calls = [process.about(), process.open(OpenBody())] if isinstance(process, Scenes) else []  # pyright: ignore
    if isinstance(process, Inference):
        calls = [process.infer(CLIPS[0].frames)]
    for call in calls:
        with pytest.raises(EnvironmentFault, match="could not start"):
            asyncio.run(call)
    monkeypatch.setattr(deployments, "FAILED_SECONDS", -1.0)
    with pytest.raises(EnvironmentFault, match="could not start"):
        process.check_health()


def test_an_unforeseen_error_at_the_start_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inference, "open_model", lambda *_: 1 / 0)
    failed = asyncio.run(Inference(SETTINGS, "").ready())
    assert failed
    assert "ZeroDivisionError" in failed
