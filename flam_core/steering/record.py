"""What was done, as JSON that can be done again: `actions.json` of `jobs/generate.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from flam_core.errors import DataError
from flam_core.steering.discovered import DiscoveredActions
from flam_core.steering.generate import MOST_STEPS, Film, frames_digest
from flam_core.steering.scene import Feedback

RECORD_FILE = "actions.json"
_VERSION = 1


@dataclass(frozen=True)
class FilmRecord:
    """The latent actions of a film. Numbers are float32, written so that each comes back bit for bit."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    label: Annotated[str, Field(pattern="^[^$]{1,100}$")]
    """What the film is called beside its pictures, where $ would begin a formula."""
    known: list[list[list[float]]]
    """[t - 1][K][A], between the given frames."""
    actions: Annotated[list[list[list[float]]], Field(min_length=1, max_length=MOST_STEPS)]
    """[S][K][A], one a step."""
    codes: list[list[int | None]] | None
    """[S][K]: the discovered code that each is nearest to; None where no codes are known, or for a code of a codebook
    that is not among the discovered ones."""
    frames_sha256: str
    """Of the S frames that came of them."""

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor]:
        """Known actions float32 [t - 1, K, A], None for one given frame, and those that were taken [S, K, A].

        Raises DataError if they are no such arrays.
        """
        try:
            known = torch.tensor(self.known, dtype=torch.float32) if self.known else None
            return known, torch.tensor(self.actions, dtype=torch.float32)
        except ValueError as error:
            raise DataError(f"the actions of {self.label!r} differ in length", fix="Was the file edited?") from error


@dataclass(frozen=True)
class Record:
    """All that it takes to get the same frames again, but for the model and the given frames themselves."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    model: str
    """As it was named."""
    weights_sha256: str
    mode: str
    seed: int
    feedback: Feedback
    slot: int | None
    """The edited one."""
    source: dict[str, str]
    """Where the clips came from, for people."""
    start_frames: Annotated[int, Field(ge=1)]
    start_sha256: str
    """Of the given frames."""
    films: list[FilmRecord]
    kind: Literal["flam films"] = "flam films"
    version: int = _VERSION

    def to_json(self) -> str:
        """As text for `read_record`."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"

    def check(self, weights_sha256: str, start: Tensor) -> None:
        """Raises DataError unless it is of these weights and these given frames, uint8 [t, H, W, 3]."""
        if weights_sha256 != self.weights_sha256:
            raise DataError(
                f"the actions are those of {self.model} with weights {self.weights_sha256[:12]}..., and this model's "
                f"are {weights_sha256[:12]}...",
                fix="Latent actions mean nothing to another model: replay them with their own.",
            )
        if (digest := frames_digest(start)) != self.start_sha256:
            raise DataError(
                f"the actions start from {self.start_frames} frames of sha256 {self.start_sha256[:12]}..., and these "
                f"{len(start)} are {digest[:12]}...",
                fix="Give the clip that they were made from, or leave the frames.npz beside them as it is.",
            )


def record_film(label: str, film: Film, discovered: DiscoveredActions | None) -> FilmRecord:
    """A film's part of a record."""
    codes = None if discovered is None else discovered.numbers(film.actions)
    return FilmRecord(label, film.known.tolist(), film.actions.tolist(), codes, frames_digest(film.frames))


def read_record(content: bytes, name: str) -> Record:
    """What `Record.to_json` gave, of which each part fits the others. Raises DataError, with `name`, for anything else.

    Whether it fits a model is what `Record.check` says.
    """
    try:
        record = TypeAdapter(Record).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise DataError(
            f"{name} is no record of jobs/generate.py: {where}: {first['msg']}",
            fix="Give the actions.json of a folder that jobs/generate.py wrote.",
        ) from error
    if record.version != _VERSION or not record.films:
        what = f"of version {record.version}" if record.films else "without films"
        raise DataError(f"{name} is a record {what}", fix=f"This flam replays version {_VERSION}.")
    if odd := _odd(record):
        raise DataError(f"{name}: {odd}", fix="Was the file edited? Give it as jobs/generate.py wrote it.")
    return record


def _odd(record: Record) -> str:
    """What does not fit together in a record; empty if all does. Raises DataError for actions that are no arrays."""
    first, *others = record.films
    if len({film.label for film in record.films}) < len(record.films):
        return "two films have the same label"
    shape = first.tensors[1].shape
    if 0 in shape:
        return f"the actions of {first.label!r} are empty"
    for film in others:
        if (other := film.tensors[1].shape) != shape:  # they are shown side by side
            return f"the actions of {film.label!r} are {list(other)}, and those of {first.label!r} {list(shape)}"
    between = (record.start_frames - 1, *shape[1:])
    for film in record.films:
        known, actions = film.tensors
        if known is None:
            known = actions[:0]
        if known.shape != between:
            return f"{record.start_frames} given frames have known actions {list(between)}, not {list(known.shape)}"
        if not (known.isfinite().all() and actions.isfinite().all()):
            return f"the actions of {film.label!r} are beyond float32"
    if record.slot is not None and not 0 <= record.slot < shape[1]:
        return f"slot {record.slot}, and the films have slots 0 to {shape[1] - 1}"
    return ""
