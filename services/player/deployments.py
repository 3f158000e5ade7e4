"""The processes of the player: one that answers HTTP, one that plays scenes, some that answer the API.

The one that answers HTTP has no model, so it answers while those that have one are busy. Each model is used by one
thread of its process; requests wait for it in a queue that is bounded, and whoever finds it full is told to come again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ray import serve

from flam_core.errors import EnvironmentFault, FlamError, pack
from services.player.errors import unusable
from services.player.settings import PlayerSettings
from services.player.wire import OpenBody, SceneView, ServerView, SessionView, StepBody

if TYPE_CHECKING:
    from services.player.models import Served, ServedModel
    from services.player.sessions import Now, Session
    from services.player.work import ToEdit, ToRoll

ResultT = TypeVar("ResultT")
_LOG = logging.getLogger("ray.serve")
FAILED_SECONDS = 20.0
"""For which a process that could not start says why before it is started again."""
_WAIT_FOR_MORE = 0.004
"""Seconds that a request to the API waits for others to go with."""


class _Process(ABC):
    """What processes with a model share. One that cannot start says why to whoever asks, and is started again when it
    has said so for a while."""

    def __init__(self, settings: PlayerSettings, tracking: str) -> None:
        self.settings, self.tracking = settings, tracking
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._clips: list[Any] | None = None
        self._failed: str | None = None
        try:
            self._start()
        except FlamError as error:
            self._failed = pack(error)
        except Exception as error:  # noqa: BLE001 - Serve would try again without end, and nobody would be told why
            _LOG.exception("the model's process does not start")
            fix = "Ray Serve's logs have all of it (/tmp/ray/session_latest/logs/serve)."
            self._failed = pack(EnvironmentFault(f"{type(error).__name__} while the model was read", fix=fix))
        self._begun = time.monotonic()

    @abstractmethod
    def _start(self) -> None:
        """Read the models. Raises FlamError if there is none to serve."""

    async def ready(self) -> str | None:
        """None, or why it is of no use, as `flam_core.errors.pack` gives it."""
        return self._failed

    def check_health(self) -> None:
        """What Ray Serve asks every few seconds; where it raises, Serve starts the process anew.

        Not at once: the program that starts the player is to hear why, and whoever asks meanwhile.
        """
        if self._failed is not None and time.monotonic() - self._begun > FAILED_SECONDS:
            raise unusable(self._failed)

    def check_started(self) -> None:
        """Raises EnvironmentFault if it is of no use."""
        if self._failed is not None:
            raise unusable(self._failed)

    def open_model(self, address: str) -> ServedModel:
        """The model that an address means, followed from now on where that may change. Raises as `ServedModel`."""
        import torch

        from services.player.models import ServedModel

        torch.set_num_threads(self.settings.threads)
        device = torch.device("cuda" if self.settings.gpus else "cpu")
        served = ServedModel(address, self.tracking, self.clips, device, self.settings.seed)
        served.follow(self.settings.poll_seconds)
        return served

    def clips(self) -> list[Any]:
        """The clips that scenes start from, read once."""
        from services.player.models import start_clips

        if self._clips is None:
            self._clips = start_clips(self.settings, self.tracking)
        return self._clips

    async def run(self, work: Callable[..., ResultT], *given: Any) -> ResultT:
        """Do it in the model's thread. Raises EnvironmentFault if there is no model."""
        self.check_started()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)


class Scenes(_Process):
    """Plays scenes. There is one, since the scenes are in its memory."""

    def _start(self) -> None:
        from services.player.sessions import Sessions

        addresses = [self.settings.model, self.settings.challenger]
        self._models = [self.open_model(address) for address in addresses if address is not None]
        self._sessions = Sessions(self.settings.limits)

    async def about(self) -> ServerView:
        """The first model, and the limits."""
        self.check_started()
        model = self._models[0]
        limits = {name: float(value) for name, value in asdict(self.settings.limits).items()}
        return ServerView(model=model.current.view, trouble=self._now.trouble, limits=limits)

    async def open(self, body: OpenBody) -> SessionView:
        """Begin a scene."""
        return await self.run(self._open, body, None)

    async def show(self, name: str) -> SessionView:
        """A scene as it stands."""
        return await self.run(lambda: self._sessions.get(name).opened(self._now))

    async def step(self, name: str, body: StepBody) -> SceneView:
        """One step of it."""
        return await self.run(self._step, name, body)

    async def undo(self, name: str) -> SceneView:
        """Take the last one back."""
        return await self.run(self._undo, name)

    async def reset(self, name: str, body: OpenBody) -> SessionView:
        """The same scene, or another, from its start, by the models that are meant now."""
        return await self.run(self._open, body, name)

    async def end(self, name: str) -> None:
        """Forget it."""
        await self.run(lambda: self._sessions.end(name))

    async def gif(self, name: str, since: int) -> bytes:
        """Its film. It is drawn beside the model's thread, so that other scenes go on."""
        from services.player.film import gif

        films = await self.run(lambda: [list(side.film) for side in self._sessions.get(name).sides])
        return await asyncio.to_thread(gif, films, since)

    async def record(self, name: str, side: int) -> str:
        """Its actions, for `jobs/generate.py --mode replay`."""
        from services.player.film import record

        return await self.run(lambda: record(self._sessions.get(name), side, self.settings.feedback))

    @property
    def _now(self) -> Now:
        from services.player.sessions import Now

        trouble = next((one.trouble for one in self._models if one.trouble), None)
        return Now([model.current.version for model in self._models], trouble)

    def _open(self, body: OpenBody, instead_of: str | None) -> SessionView:
        from services.player.sessions import Session

        if instead_of is None:
            self._sessions.room()
        else:
            self._sessions.get(instead_of)
        if body.seed is None:
            body = body.model_copy(update={"seed": self.settings.seed})
        served: list[Served] = [model.current for model in self._models]
        session = Session(served, self.clips(), body, self.settings.feedback, self.settings.limits)
        if instead_of is not None:
            self._sessions.end(instead_of)
            session.id = instead_of
        self._sessions.add(session)
        return session.opened(self._now)

    def _step(self, name: str, body: StepBody) -> SceneView:
        session: Session = self._sessions.get(name)
        session.step(body)
        return session.view(self._now)

    def _undo(self, name: str) -> SceneView:
        session: Session = self._sessions.get(name)
        session.undo()
        return session.view(self._now)


class Inference(_Process):
    """Answers the API. There may be several."""

    def _start(self) -> None:
        self._model = self.open_model(self.settings.model)
        for batched in (self._infer, self._roll):
            batched.set_max_batch_size(self.settings.limits.batch)  # pyright: ignore[reportAttributeAccessIssue]

    async def side(self) -> int:
        """Pixels along each side of the model's frames."""
        self.check_started()
        return self._model.current.model.tokenizer.config.frame_size

    async def infer(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Latent actions [T - 1, K, A] of a clip, their codes [T - 1, K], and the model's version."""
        from services.player.inference import check_clip

        self.check_started()
        served = self._model.current
        check_clip(served, frames)
        return (*await self._infer((served, frames)), served.version)

    async def roll(self, asked: ToRoll) -> tuple[np.ndarray, str | None]:
        """Frames uint8 [S, H, W, 3], and the model's version."""
        from services.player.inference import check_roll

        self.check_started()
        served = self._model.current
        check_roll(served, asked, self.settings.limits.clip_frames)
        return await self._roll((served, asked)), served.version

    async def edit(self, asked: ToEdit) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Frames uint8 [T - 1, H, W, 3], actions [T - 1, K, A], and the model's version."""
        from services.player.inference import edit

        self.check_started()
        served = self._model.current
        return (*await self.run(edit, served, asked), served.version)

    @serve.batch(batch_wait_timeout_s=_WAIT_FOR_MORE)
    async def _infer(self, waiting: list[tuple[Served, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        from services.player.inference import infer

        return await self.run(_of_each_model, infer, waiting)

    @serve.batch(batch_wait_timeout_s=_WAIT_FOR_MORE)
    async def _roll(self, waiting: list[tuple[Served, ToRoll]]) -> list[np.ndarray]:
        from services.player.inference import roll

        return await self.run(_of_each_model, roll, waiting)


def _of_each_model(
    work: Callable[[Served, list[Any]], list[ResultT]], waiting: list[tuple[Served, Any]]
) -> list[ResultT]:
    """`work` on what waits for each model (two, just after the alias has moved); results in order."""
    found: list[Any] = [None] * len(waiting)
    for served in dict.fromkeys(served for served, _ in waiting):
        mine = [number for number, (one, _) in enumerate(waiting) if one is served]
        for number, result in zip(mine, work(served, [waiting[number][1] for number in mine]), strict=True):
            found[number] = result
    return found


@serve.ingress()
class Door:
    """Answers HTTP."""

    def __init__(self, settings: PlayerSettings, access: Any, scenes: Any, inference: Any) -> None:
        self._given = settings, access, scenes, inference

    def __serve_build_asgi_app__(self) -> Any:
        """Serve asks for the app after construction."""
        from services.player.app import make_app

        return make_app(*self._given)

    async def ready(self) -> str | None:
        """None, or why the server is of no use, as `flam_core.errors.pack` gives it."""
        _, _, scenes, inference = self._given
        failed = await asyncio.gather(scenes.ready.remote(), inference.ready.remote())
        return next((one for one in failed if one is not None), None)
