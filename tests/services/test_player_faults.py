"""What the player answers when something of its own is wrong: JSON with the reason, and no internals. Ray Serve, and
the processes behind it, are stand-ins here."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from flam_core.errors import DataError, EnvironmentFault, pack
from services.player import app, deployments
from services.player.app import Line, make_app
from services.player.deployments import Inference, Scenes
from services.player.errors import Busy
from services.player.guard import Access
from services.player.settings import PlayerSettings
from services.player.wire import OpenBody, frames_to_text
from tests.services.player_fixture import SIZE, SLOTS
from tests.services.test_player_sessions import CLIPS

SETTINGS = PlayerSettings(model="model", data="data")
Answer = Callable[..., Any]
Told = Callable[[], Awaitable[str | None]]


class Process:
    """A deployment's handle: every method gives, or raises, what it is told to."""

    def __init__(self, answer: Answer, ready: str | Told | None = None) -> None:
        """ready: what `ready` gives, or stands in for it."""

        async def remote(*given: object) -> Any:
            return answer(*given)

        async def told() -> str | None:
            return await ready() if callable(ready) else ready

        self.told, self.remote = SimpleNamespace(remote=told), SimpleNamespace(remote=remote)

    def __getattr__(self, name: str) -> Any:
        return self.told if name == "ready" else self.remote


def ask(path: str, body: object = None, *, scenes: Process, inference: Process) -> tuple[int, dict[str, Any]]:
    """The status and the JSON that the app answers with."""
    return answered(make_app(SETTINGS, Access(None, None), scenes, inference), path, body)


def answered(made: FastAPI, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    """The same of an app that is there already."""
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
        code, said = ask(path, body, scenes=process, inference=process)
        assert code == status
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


async def busy() -> str | None:
    await asyncio.sleep(60)
    return None


def test_health_of_a_busy_player_is_what_it_was() -> None:
    began = time.monotonic()
    assert ask("/health", scenes=Process(raising(KeyError()), busy), inference=FINE) == (200, {"status": "ok"})
    failed = pack(DataError("model.safetensors is missing", fix="Train it."))
    said = iter([failed, None])

    async def ready() -> str | None:  # at first it says why it is of no use, then it has too much to do
        return next(said) or await busy()

    made = make_app(SETTINGS, Access(None, None), FINE, Process(raising(KeyError()), ready))
    assert [answered(made, "/health")[0] for _ in range(2)] == [503, 503]
    assert time.monotonic() - began < 30


def test_a_full_line_refuses_who_comes_and_a_place_is_free_again_after_each() -> None:
    working = asyncio.Event()

    class Slow:
        async def work(self, given: object) -> object:
            await working.wait()
            if given == "wrong":
                raise RayTaskError("work", "", DataError("no", fix="None."))
            return given

        def __getattr__(self, _: str) -> Any:
            return SimpleNamespace(remote=self.work)

    async def main() -> None:
        line = Line(Slow(), 2)
        first, wrong = (asyncio.create_task(line.ask("infer", given)) for given in (1, "wrong"))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await line.ask("roll", 3)
        working.set()
        assert await first == 1
        with pytest.raises(DataError):
            await wrong
        working.clear()
        gone = asyncio.create_task(line.ask("infer", 4))
        await asyncio.sleep(0)
        gone.cancel()  # whose client has gone
        with suppress(asyncio.CancelledError):
            await gone
        working.set()
        assert await asyncio.gather(line.ask("infer", 5), line.ask("infer", 6)) == [5, 6]

    asyncio.run(main())


def test_latent_actions_are_bounded_and_not_read_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[threading.Thread] = []

    def read(*_: object) -> np.ndarray:
        where.append(threading.current_thread())
        return np.zeros((2, SLOTS, 4), dtype=np.float32)

    monkeypatch.setattr(app, "numbers", read)
    inference = Process(lambda *given: (CLIPS[0].frames[:1], None) if given else SIZE)

    def roll(actions: Sequence[object]) -> tuple[int, dict[str, Any]]:
        return ask("/api/rollout", {"frames": FRAMES, "actions": actions}, scenes=FINE, inference=inference)

    assert roll([[[0.0] * 4] * SLOTS] * 2)[0] == 200
    assert where.pop() is not threading.main_thread()
    most = 1 + SETTINGS.limits.clip_frames
    status, said = roll([[[0.0]]] * (most + 1))
    assert (status, said["error"]) == (422, f"{most + 1} latent actions are sent, and {most} are the limit")
    put = {"kind": "actions", "actions": [[0.0]] * most}
    status, said = ask("/api/edit", {"frames": FRAMES, "slot": 0, "put": put}, scenes=FINE, inference=inference)
    assert (status, said["error"]) == (422, f"{most} latent actions are sent, and {most - 1} are the limit")
    long = [0.0] * 1025
    assert roll([[long]])[0] == 422
    put = {"kind": "actions", "actions": [long]}
    assert ask("/api/edit", {"frames": FRAMES, "slot": 0, "put": put}, scenes=FINE, inference=inference)[0] == 422
    assert not where


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
