"""Scenes that are played: one model or two from the same start, with the same keys. Few of them, and each for a while.

Nothing here is made for more than one thread: who uses it calls from one. Two models of a scene take its steps in two.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flam_core.errors import DataError, SettingsError
from flam_core.steering.directions import directed
from flam_core.steering.scene import Scene, SceneState
from services.player.errors import Busy, Gone
from services.player.models import Served, StartClip
from services.player.settings import Feedback, Limits
from services.player.wire import OpenBody, SceneView, SessionView, SideView, StepBody, png, text

_BESIDE = ThreadPoolExecutor(2, thread_name_prefix="side")
"""Takes the steps of sides but the first."""


@dataclass(frozen=True, eq=False)
class Now:
    """What the models' addresses mean now, whatever a scene began with."""

    versions: Sequence[str | None]
    trouble: str | None = None
    """Why one of them could not be followed at the last look."""


@dataclass(frozen=True, eq=False)
class _Before:
    """What a step is taken back to."""

    states: tuple[SceneState, ...]
    generators: tuple[Tensor, ...]


@dataclass(eq=False)
class Side:
    """What one model makes of the scene."""

    served: Served
    scene: Scene
    video: Tensor
    """float32 [T - 1, K, A]: what the clip's slots do."""
    generator: torch.Generator
    film: list[bytes]
    """PNG files: the start, then a frame a step."""
    taken: list[Tensor] = field(default_factory=list)
    """float32 [K, A] of each step."""
    slot: int | None = None
    """That was steered last."""
    arrives: bool | None = None
    """Whether the last step went the way that was asked for, where one was."""

    def view(self) -> SideView:
        """For the wire."""
        return SideView(frame=text(self.film[-1]), masks=_masks(self.scene), slot=self.slot, arrives=self.arrives)


class Session:
    """A scene with its past."""

    def __init__(
        self, served: Sequence[Served], clips: Sequence[StartClip], body: OpenBody, feedback: Feedback, limits: Limits
    ) -> None:
        """Raises nothing that the models' own checks at the start have not."""
        self.id = secrets.token_urlsafe(18)
        self.clip, self.seed = body.clip % len(clips), body.seed or 0
        self.clips, self.source, self._limits = len(clips), clips[self.clip].source, limits
        frames = torch.from_numpy(clips[self.clip].frames)
        self.sides = [self._side(one, frames, feedback) for one in served]
        size = sum(_most_bytes(side) for side in self.sides)
        self._past: deque[_Before] = deque(maxlen=max(1, min(limits.undo, int(limits.undo_mb * 2**20) // size)))
        self._bound: dict[int, list[int]] = {}
        self.used = time.monotonic()

    def _side(self, served: Served, frames: Tensor, feedback: Feedback) -> Side:
        scene = Scene(served.model, frames[:1], feedback)
        seen = served.model.encode(frames[None].to(next(served.model.parameters()).device))
        video = served.model.infer_actions(served.model.slots(seen)[0])[0].float().cpu()
        generator = torch.Generator().manual_seed(self.seed)
        return Side(served, scene, video, generator, film=[png(scene.frame.numpy())])

    @property
    def steps(self) -> int:
        """Taken since the start."""
        return len(self.sides[0].taken)

    def step(self, body: StepBody) -> None:
        """One step of every side, or of none.

        Raises SettingsError for a slot, a code or a direction that there is not, DataError after the last step that
        the server keeps.
        """
        if self.steps >= self._limits.steps:
            raise DataError(f"the scene has taken its {self._limits.steps} steps", fix="Take some back, or reset it.")
        check_choice(self.sides[0].served, body)
        slots = None if body.slot is None else self._slots(body.slot)
        before = _Before(
            tuple(side.scene.snapshot() for side in self.sides),
            tuple(side.generator.get_state() for side in self.sides),
        )
        steps = self.steps
        # Each side in a thread of its own: they have nothing in common that changes.
        first, *others = range(len(self.sides))
        waiting = [_BESIDE.submit(self._advance, number, body, slots) for number in others]
        try:
            try:
                self._advance(first, body, slots)
            finally:
                wait(waiting)
            for one in waiting:
                one.result()
        except Exception:
            self._go_back(before, steps)  # a side that went on alone would never be in step again
            raise
        self._past.append(before)

    def _advance(self, number: int, body: StepBody, slots: list[int] | None) -> None:
        """A step of one side."""
        side = self.sides[number]
        actions = self._others(side, body)
        side.arrives = None
        if slots is not None:
            side.slot = slots[number]
            actions[side.slot] = self._steered(side, body, actions)
        side.film.append(png(side.scene.step(actions).numpy()))
        side.taken.append(actions)

    def undo(self) -> None:
        """Take the last step back. Raises DataError if it cannot be."""
        if not self._past:
            raise DataError("there is no step to take back", fix="The scene is at its start, or too much was undone.")
        self._go_back(self._past.pop(), self.steps - 1)

    def _go_back(self, before: _Before, steps: int) -> None:
        """All sides as they were after so many steps."""
        for side, state, generator in zip(self.sides, before.states, before.generators, strict=True):
            side.scene.restore(state)
            side.generator.set_state(generator)
            del side.film[1 + steps :], side.taken[steps:]

    def _others(self, side: Side, body: StepBody) -> Tensor:
        """Latent actions [K, A] of a step that nobody steers."""
        if body.others == "prior":
            return side.scene.sample(side.generator).float().cpu()
        if body.others == "video" and len(side.taken) < len(side.video):
            return side.video[len(side.taken)].clone()
        return side.served.still(side.scene)

    def _steered(self, side: Side, body: StepBody, others: Tensor) -> Tensor:
        """The latent action [A] of the slot of a side that is steered; others: those of all slots otherwise."""
        actions, slot, first = side.served.actions, side.slot, self.sides[0].served
        assert slot is not None  # the step has seen to it
        if body.code is not None:
            assert body.slot is not None  # as above
            own = body.code
            if side.served.weights_sha256 != first.weights_sha256:  # its codes have other numbers
                motion = first.actions.motion[body.slot][body.code]
                own = int((actions.motion[slot] - motion).norm(dim=-1).argmin())
            return actions.vector(slot, own)
        way, examples = body.arrow or "still", side.served.examples(slot)
        if examples is not None:
            found = directed(side.scene, slot, way, examples, others)
            side.arrives = found.arrives
            return found.action
        arrows = actions.arrows(slot)
        return actions.vector(slot, arrows.get(way, actions.still(slot)))

    def _slots(self, slot: int) -> list[int]:
        """The slot of each side for what `slot` of the first one is: the same place in the picture, as it was when the
        slot was first steered."""
        if slot not in self._bound:
            first = self.sides[0]
            masks = first.scene.masks
            self._bound[slot] = [slot]
            for side in self.sides[1:]:
                own = side.scene.masks
                if side.served.weights_sha256 == first.served.weights_sha256:
                    self._bound[slot].append(slot)
                elif masks is None or own is None:
                    self._bound[slot].append(min(slot, side.served.actions.slots - 1))
                else:
                    self._bound[slot].append(int((_enlarged(own) * _enlarged(masks)[slot]).sum(dim=-1).argmax()))
        return self._bound[slot]

    def view(self, now: Now) -> SceneView:
        """For the wire."""
        return SceneView(**self._view(now))

    def opened(self, now: Now) -> SessionView:
        """The same with the models."""
        models = [side.served.view for side in self.sides]
        return SessionView(**self._view(now), clips=self.clips, models=models)

    def _view(self, now: Now) -> dict[str, Any]:
        return {
            "session": self.id,
            "step": self.steps,
            "clip": self.clip,
            "seed": self.seed,
            "video_left": max(0, len(self.sides[0].video) - self.steps),
            "undo_left": len(self._past),
            "newest": now.versions[0],
            "newest_challenger": now.versions[1] if len(now.versions) > 1 else None,
            "trouble": now.trouble,
            "sides": [side.view() for side in self.sides],
        }


class Sessions:
    """The scenes of a server, by id."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._all: OrderedDict[str, Session] = OrderedDict()
        """The one that was used longest ago comes first."""

    def __len__(self) -> int:
        return len(self._all)

    def room(self) -> None:
        """Make room for one more: where there is none, the scene that was left alone longest ends, if that was for
        `full_seconds` or more. Raises Busy if all are being played."""
        self._expire()
        if len(self._all) < self._limits.sessions:
            return
        if next(iter(self._all.values())).used > self._clock() - self._limits.full_seconds:
            raise Busy(
                f"all {self._limits.sessions} places of this server are taken",
                fix=f"Come again soon: left alone for {self._limits.full_seconds:g} s, a scene gives its place up.",
            )
        self._all.popitem(last=False)

    def add(self, session: Session) -> None:
        """Keep it until it was idle for too long."""
        session.used = self._clock()
        self._all[session.id] = session

    def get(self, name: str) -> Session:
        """Raises Gone if there is none, or no longer."""
        self._expire()
        session = self._all.get(name)
        if session is None:
            raise Gone(
                f"there is no such scene: it was left alone for {self._limits.idle_seconds:g} s, or for "
                f"{self._limits.full_seconds:g} s while the server was full, or the server has started anew",
                fix="Begin another.",
            )
        session.used = self._clock()
        self._all.move_to_end(name)
        return session

    def end(self, name: str) -> None:
        """Raises Gone if there is none."""
        del self._all[self.get(name).id]

    def _expire(self) -> None:
        oldest = self._clock() - self._limits.idle_seconds
        while self._all and next(iter(self._all.values())).used < oldest:
            self._all.popitem(last=False)


def check_choice(served: Served, body: StepBody) -> None:
    """Raises SettingsError for a slot, a code or a direction that there is not, or an action without a slot."""
    if body.slot is None:
        if body.code is not None or body.arrow is not None:
            raise SettingsError("an action is given, and no slot to take it", fix="Give the slot too.")
        return
    check_way(served, body.slot, body.arrow)
    if body.code is not None:
        served.actions.vector(body.slot, body.code)
    if body.code is not None and body.arrow is not None:
        raise SettingsError("both a code and an arrow are given", fix="Give one of them.")


def check_way(served: Served, slot: int, arrow: str | None) -> None:
    """Raises SettingsError for a slot that there is not, or that was never seen to go that way."""
    ways = served.ways(slot)
    if arrow not in (None, "still", *ways):
        raise SettingsError(
            f"slot {slot} has learnt nothing that moves it {arrow}", fix=f"It has: {', '.join(ways) or 'nothing'}."
        )


def _masks(scene: Scene) -> str | None:
    masks = scene.masks
    if masks is None:
        return None
    return text((masks.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes())


def _enlarged(masks: Tensor, side: int = 32) -> Tensor:
    """Masks [K, P] of any grid as [K, side * side], so that those of two models can be compared."""
    grid = round(masks.shape[-1] ** 0.5)
    square = masks.float().cpu().view(len(masks), 1, grid, grid)
    return torch.nn.functional.interpolate(square, size=(side, side)).flatten(1)


def _most_bytes(side: Side) -> int:
    """Of a state of a side, when it has grown from one frame to the model's window."""
    state, window = side.scene.snapshot(), side.served.model.dynamics.config.temporal_window
    growing = state.frames.nbytes + state.z.nbytes + state.slots.nbytes + side.video[0].nbytes
    return window * growing + sum(one.nbytes for one in (state.masks, state.places) if one is not None)
