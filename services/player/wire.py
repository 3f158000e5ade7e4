"""What goes over the wire, as JSON. Frames are PNG files in base64, so any language reads and writes them.

Latent actions are plain lists of numbers: a float32 goes there and back bit for bit. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from flam_core.errors import DataError
from services.player.settings import Feedback, Others

Arrow = Literal["up", "right", "down", "left", "still"]
Number = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]
Index = Annotated[int, Field(ge=0, le=10_000)]
Frame = Annotated[str, Field(max_length=4_000_000, description="A PNG file, RGB, in base64.")]
Action = Annotated[list[Number], Field(max_length=1024)]
Transition = Annotated[list[Action], Field(max_length=256, description="[K, A]: a latent action of each slot.")]

_MOST_PIXELS = 1024 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD_BYTES, _HEAD_LETTERS = 24, 32
"""Of a PNG file, up to its height; in base64."""


class Body(BaseModel):
    """A request: what it does not know of is an error, and no text is taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorBody(BaseModel):
    """Any answer that is not 2xx."""

    error: str
    fix: str


class Health(BaseModel):
    """The server is up."""

    status: Literal["ok"]


class Code(BaseModel):
    """A discovered action of a slot."""

    motion: list[float] = Field(description="Where it moves the slot, (x, y) in shares of the frame's side; y is down.")
    usage: float = Field(description="Share of the slot's transitions that it explains.")
    consistency: float = Field(description="1: it moves the slot so wherever it stands. 0: anywhere.")


class Slot(BaseModel):
    """What a slot can do."""

    codes: list[Code]
    other: float = Field(description="Share of its transitions that have a code which is not among them.")
    arrows: list[Arrow] = Field(description="The ways that it has been seen to go.")
    entity: int | None = Field(description="The ground-truth entity that the slot is matched with.")


class ModelView(BaseModel):
    """A model that is served."""

    address: str
    version: str | None = Field(description="In the registry; null for a folder.")
    weights_sha256: str
    frame_size: int
    action_dim: int
    slots: list[Slot]


class ServerView(BaseModel):
    """What is served, and the limits of it."""

    model: ModelView
    trouble: str | None = Field(description="Why the registry cannot be followed just now.")
    limits: dict[str, float]


class InferBody(Body):
    """A clip."""

    frames: Annotated[list[Frame], Field(min_length=2, max_length=4096)]


class Inferred(BaseModel):
    """Latent actions of the clip's transitions."""

    actions: list[Transition] = Field(description="[T - 1, K, A]")
    codes: list[list[int | None]] = Field(
        description="[T - 1, K]: the slot's discovered action that is nearest; null for a code that is not among them."
    )
    version: str | None


class RolloutBody(Body):
    """Known frames, and the latent actions from the first of them on."""

    frames: Annotated[list[Frame], Field(min_length=1, max_length=4096)]
    actions: Annotated[list[Transition], Field(min_length=1, max_length=4096)] = Field(
        description="[t - 1 + S, K, A] for t frames: those between the given frames first, then S to be predicted."
    )
    feedback: Feedback = "frames"


class PutCode(Body):
    """One of the slot's discovered actions at every step."""

    kind: Literal["code"]
    code: Index


class PutArrow(Body):
    """At every step the latent action that moves the slot in a direction from where it stands."""

    kind: Literal["arrow"]
    arrow: Arrow


class PutPrior(Body):
    """Latent actions drawn from the learned prior."""

    kind: Literal["prior"]
    seed: Seed = 0


class PutActions(Body):
    """Latent actions as given."""

    kind: Literal["actions"]
    actions: Annotated[list[Action], Field(max_length=4096)] = Field(description="[T - 1, A]")


Put = PutCode | PutArrow | PutPrior | PutActions


class EditBody(Body):
    """A clip, one of its slots, and what that slot is to do instead. The other slots do what they do in the clip."""

    frames: Annotated[list[Frame], Field(min_length=2, max_length=4096)]
    slot: Index
    put: Annotated[Put, Field(discriminator="kind")]
    feedback: Feedback = "frames"


class Frames(BaseModel):
    """Predicted frames."""

    frames: list[Frame]
    version: str | None


class Edited(Frames):
    """Predicted frames, and the latent actions that led to them."""

    actions: list[Transition] = Field(description="[T - 1, K, A]")


class OpenBody(Body):
    """Where a scene starts."""

    clip: Index = Field(0, description="Which of the held-out clips; counted round.")
    seed: Seed | None = Field(None, description="Of the prior's draws; default: the server's.")


class StepBody(Body):
    """One step. Without `slot`, nobody is steered. With neither `code` nor `arrow`, the slot stands still."""

    slot: Index | None = None
    code: Index | None = None
    arrow: Arrow | None = None
    others: Others = "video"


class SideView(BaseModel):
    """What one model shows of a scene."""

    frame: Frame
    masks: str | None = Field(description="uint8 [K, P] in base64: how the patches are shared out. null without slots.")
    slot: int | None = Field(description="Its slot that was steered last.")
    arrives: bool | None = Field(
        description="Of a step by an arrow: whether the model sees a way to go there. null for any other step."
    )


class SceneView(BaseModel):
    """A scene after a step. Of two models, the first is MODEL and the second the challenger."""

    session: str
    step: int
    clip: int
    seed: int
    video_left: int = Field(description="Steps for which the other slots can still follow the video.")
    undo_left: int
    newest: str | None = Field(description="The version that MODEL means now; a reset takes it.")
    newest_challenger: str | None = Field(description="The same of the challenger; null without one.")
    trouble: str | None = Field(description="Why the registry cannot be followed just now.")
    sides: list[SideView]


class SessionView(SceneView):
    """A scene at its start, with the models that play it."""

    clips: int
    models: list[ModelView]


def png(frame: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def text(content: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(content).decode()


def frames_to_text(frames: np.ndarray) -> list[str]:
    """uint8 [T, H, W, 3] as PNG files in base64."""
    return [text(png(frame)) for frame in frames]


def frames_from_text(frames: Sequence[str], limit: int, side: int | None = None) -> np.ndarray:
    """uint8 [T, H, W, 3] of PNG files in base64. It takes a while, so not in an event loop.

    side: pixels that each must have, by its header, before any is decoded. Raises DataError for what is not that, or
    more than `limit` frames.
    """
    if len(frames) > limit:
        raise DataError(f"{len(frames)} frames are sent, and {limit} are the limit", fix="Send a shorter clip.")
    sizes = {_size(one, number) for number, one in enumerate(frames)}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise DataError(f"frames differ in size: {shown}", fix="Send frames of one size.")
    ((width, height),) = sizes
    if side is not None and (width, height) != (side, side):
        raise DataError(
            f"frames have {width}x{height} pixels, and the model takes {side}x{side}", fix="Scale them, RGB."
        )
    if width * height > _MOST_PIXELS:
        raise DataError(f"frames have {width}x{height} pixels", fix="Scale them to the model's frame size.")
    return np.stack([_frame(one, number, (width, height)) for number, one in enumerate(frames)])


def _size(content: str, number: int) -> tuple[int, int]:
    """Width and height, as the file's first bytes have them."""
    try:
        head = base64.b64decode(content[:_HEAD_LETTERS], validate=True)
        if len(head) < _HEAD_BYTES or not head.startswith(_PNG) or head[12:16] != b"IHDR":
            raise ValueError
    except (binascii.Error, ValueError) as error:
        raise _no_png(number) from error
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def _no_png(number: int) -> DataError:
    return DataError(f"frame {number} is not a PNG file in base64", fix="Encode each frame as one.")


def _frame(content: str, number: int, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True)), formats=("PNG",)) as image:
            if image.size != size:  # a second header, by which Pillow would go
                raise _no_png(number)
            return np.asarray(image.convert("RGB"))
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _no_png(number) from error


def check_length(actions: Sequence[object], most: int) -> None:
    """Raises DataError for more latent actions than are of use: what is too long is not worth reading."""
    if len(actions) > most:
        raise DataError(f"{len(actions)} latent actions are sent, and {most} are the limit", fix="Send fewer.")


def numbers(values: Sequence[Sequence[Any]], what: str) -> np.ndarray:
    """Lists of nested lists as float32. It may take a while, so not in an event loop. Raises DataError if they are
    ragged."""
    try:
        # Step by step: other threads have no turn while numpy reads a list.
        return np.stack([np.asarray(value, dtype=np.float32) for value in values])
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} are lists of different lengths", fix="Give every step and slot as many.") from error


def known_codes(codes: np.ndarray) -> list[list[int | None]]:
    """Numbers of codes [T, K], None for -1."""
    return [[None if code < 0 else code for code in row] for row in codes.tolist()]
