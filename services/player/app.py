"""The HTTP face of the player: the page's files, and the API under `/api`, with its description at `/openapi.json`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from flam_core.errors import EnvironmentFault, FlamError
from services.player.errors import RETRY_SECONDS, Broken, Busy, status_of, unusable
from services.player.guard import HEALTH, LOG, SEE_LOGS, Access, Guard
from services.player.settings import PlayerSettings
from services.player.wire import (
    EditBody,
    Edited,
    ErrorBody,
    Frames,
    Health,
    InferBody,
    Inferred,
    OpenBody,
    PutActions,
    RolloutBody,
    SceneView,
    ServerView,
    SessionView,
    StepBody,
    check_length,
    frames_from_text,
    frames_to_text,
    known_codes,
    numbers,
)
from services.player.work import ToEdit, ToRoll

PAGE = Path(__file__).with_name("page")
_ANSWER_SECONDS = 0.5
"""For which `/health` waits for a process; what asks for it often gives up after a second."""
Name = Annotated[str, InPath(max_length=64, description="The scene's, as opening it gave it.")]
_SAID = {
    400: "Not JSON.",
    401: "Without the token.",
    403: "By a name that the server does not go by.",
    408: "Too slow.",
    413: "Too many bytes.",
    422: "Something in it cannot be.",
    500: "An error of the server's own.",
    503: "Busy, or not up.",
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _SAID.items()
}
_NO_SCENE: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such scene, or no longer."}}


def make_app(settings: PlayerSettings, access: Access, scenes: Any, inference: Any) -> FastAPI:
    """scenes, inference: handles of the deployments of those names."""
    app = FastAPI(
        title="flam player",
        version="1",
        description="Steer, infer, roll out and edit with a FLAM world model. Frames are PNG files in base64.",
        docs_url=None,  # those of FastAPI load from other sites; docs.html is ours
        redoc_url=None,
    )

    pulses = _Pulse(scenes), _Pulse(inference)

    @app.get(HEALTH, responses={503: _REFUSALS[503]}, tags=["server"])
    async def health() -> Health:
        """Whether the models are there, however busy they are. Needs no token."""
        for failed in await asyncio.gather(*(pulse.failed() for pulse in pulses)):
            if failed is not None:
                raise unusable(failed)
        return Health(status="ok")

    to_scenes, to_inference = (Line(process, settings.limits.queue) for process in (scenes, inference))
    app.include_router(_api(settings, to_inference, to_scenes), prefix="/api", responses=_REFUSALS)
    app.include_router(_scenes(to_scenes), prefix="/api/sessions", responses=_REFUSALS)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    app.add_middleware(Guard, access=access, limits=settings.limits)
    app.add_exception_handler(FlamError, _refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    return app


class _Pulse:
    """Whether a deployment has a model. What it said last stands while it has too much to do to say it again."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._failed: str | None = None

    async def failed(self) -> str | None:
        """None, or why it is of no use, as `flam_core.errors.pack` gives it. Raises as `asked`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                self._failed = await asked(self._process.ready.remote)
        return self._failed


class Line:
    """Requests to a deployment that wait there or are worked on, so many and no more.

    Serve's own bound on requests at work makes its router ask again and again whether one has ended, with pauses of up
    to half a second: with it, 32 clients got two thirds of the answers, and the slowest took twice as long
    (docs/play.md).
    """

    def __init__(self, process: Any, most: int) -> None:
        self._process, self._most = process, most
        self._inside = 0

    async def ask(self, method: str, *given: Any) -> Any:
        """Raises Busy if the line is full, else as `asked`."""
        if self._inside >= self._most:
            raise Busy("the server is busy", fix="Come again.")
        self._inside += 1
        try:
            return await asked(getattr(self._process, method).remote, *given)
        finally:
            self._inside -= 1


def _api(settings: PlayerSettings, inference: Line, scenes: Line) -> APIRouter:
    api = APIRouter(tags=["model"])
    limit = settings.limits.clip_frames

    sides: list[int] = []

    async def frames(sent: list[str]) -> Any:
        if not sides:  # every version that is served has the data set's
            sides.append(await inference.ask("side"))
        return await asyncio.to_thread(frames_from_text, sent, limit, sides[0])

    @api.get("")
    async def about() -> ServerView:
        """What is served: slots, their discovered actions, and the limits."""
        return await scenes.ask("about")

    @api.post("/infer")
    async def infer(body: InferBody) -> Inferred:
        """The latent actions of a clip, and the discovered actions that they are nearest to."""
        actions, codes, version = await inference.ask("infer", await frames(body.frames))
        return Inferred(actions=actions.tolist(), codes=known_codes(codes), version=version)

    @api.post("/rollout")
    async def rollout(body: RolloutBody) -> Frames:
        """The frames that follow the given ones under the given latent actions."""
        check_length(body.actions, len(body.frames) - 1 + limit)
        actions = await asyncio.to_thread(numbers, body.actions, "latent actions")
        asked_for = ToRoll(await frames(body.frames), actions, body.feedback)
        drawn, version = await inference.ask("roll", asked_for)
        return Frames(frames=await asyncio.to_thread(frames_to_text, drawn), version=version)

    @api.post("/edit")
    async def edit(body: EditBody) -> Edited:
        """The clip anew from its first frame, in which one slot does something else."""
        if isinstance(body.put, PutActions):
            check_length(body.put.actions, limit)
        asked_for = ToEdit(await frames(body.frames), body.slot, body.put, body.feedback)
        drawn, actions, version = await inference.ask("edit", asked_for)
        return Edited(frames=await asyncio.to_thread(frames_to_text, drawn), actions=actions.tolist(), version=version)

    return api


def _scenes(scenes: Line) -> APIRouter:
    api = APIRouter(tags=["scenes"])

    @api.post("", status_code=201)
    async def begin(body: OpenBody) -> SessionView:
        """Begin a scene from a held-out clip's first frame."""
        return await scenes.ask("open", body)

    @api.get("/{name}", responses=_NO_SCENE)
    async def show(name: Name) -> SessionView:
        """A scene as it stands."""
        return await scenes.ask("show", name)

    @api.delete("/{name}", status_code=204, responses=_NO_SCENE)
    async def end(name: Name) -> None:
        """Forget it, so that another has its place."""
        await scenes.ask("end", name)

    @api.post("/{name}/step", responses=_NO_SCENE)
    async def step(name: Name, body: StepBody) -> SceneView:
        """One step: a slot does what it is told, the others follow the video, the prior, or stand still."""
        return await scenes.ask("step", name, body)

    @api.post("/{name}/undo", responses=_NO_SCENE)
    async def undo(name: Name) -> SceneView:
        """Take the last step back."""
        return await scenes.ask("undo", name)

    @api.post("/{name}/reset", responses=_NO_SCENE)
    async def reset(name: Name, body: OpenBody) -> SessionView:
        """From the start again, this clip's or another's, with the models that the addresses mean now."""
        return await scenes.ask("reset", name, body)

    @api.get("/{name}/film.gif", responses={**_NO_SCENE, 200: {"content": {"image/gif": {}}}}, response_class=Response)
    async def film(name: Name, since: Annotated[int, Query(ge=0, le=100_000)] = 0) -> Response:
        """The scene since a step, as a GIF."""
        content = await scenes.ask("gif", name, since)
        return Response(content, media_type="image/gif", headers=_attachment("scene.gif"))

    @api.get(
        "/{name}/actions.json",
        responses={**_NO_SCENE, 200: {"content": {"application/json": {}}}},
        response_class=Response,
    )
    async def actions(name: Name, side: Annotated[int, Query(ge=0, le=1)] = 0) -> Response:
        """What was done, for `jobs/generate.py --mode replay`, which gives the same frames bit for bit."""
        content = await scenes.ask("record", name, side)
        return Response(content, media_type="application/json", headers=_attachment("actions.json"))

    return api


async def asked(method: Callable[..., Awaitable[Any]], *given: Any) -> Any:
    """Of a deployment. Raises the FlamError that it met there, EnvironmentFault if it is gone or cannot be reached,
    Broken for any other error."""
    try:
        return await method(*given)
    except RayTaskError as error:
        if isinstance(error.cause, FlamError):
            raise error.cause from None
        raise Broken("the server met an error of its own", fix=SEE_LOGS) from error
    except (RayActorError, RayServeException) as error:
        raise EnvironmentFault(
            "the process with the model is not up, and is being started anew", fix="Come again."
        ) from error


def _attachment(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"'}


def _json(status: int, what: str, fix: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": what, "fix": fix}, status_code=status, headers=headers)


def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, FlamError)
    status = status_of(error)
    if isinstance(error, Broken):
        LOG.error("%s", error.what, exc_info=error.__cause__)
    return _json(status, error.what, error.fix, {"retry-after": str(RETRY_SECONDS)} if status == 503 else None)


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return _json(422, f"{place}: {first['msg']}", "See docs.html or /openapi.json for what is taken.")


def _plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    fix = "See docs.html or /openapi.json for what there is."
    return _json(error.status_code, f"{request.method} {request.url.path}: {error.detail}", fix, headers)
