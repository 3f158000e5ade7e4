"""One request of `jobs/generate.py`: read the model and the clips, make the films, write what is to be seen."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.image import psnr
from flam_core.model import Flam
from flam_core.saved_model import load, model_folder, saved_sha256
from flam_core.steering import generate as steering
from flam_core.steering.discovered import DiscoveredActions, discover_actions, load_actions
from flam_core.steering.generate import Film, frames_digest
from flam_core.steering.pictures import Panel, film_gif, film_mp4, film_strip, masks_panel
from flam_core.steering.record import RECORD_FILE, Record, read_record, record_film
from services.steering.clips import Clips
from services.steering.settings import GenerateSettings
from services.storage import read_bytes, resolve, write_bytes

_STEPS, _SAMPLES = 20, 4
"""By default."""
_FRAMES_FILE = "frames.npz"
_CLIPS, _FRAMES = 64, 11
"""Of a data set, that slots' codes are found in where the model does not bring them."""


@dataclass(frozen=True, eq=False)
class _Made:
    """Films by label, what is shown beside them, and how good they are where that can be told.

    truth: uint8 [t + S, H, W, 3]. beside: more panels of so many frames, shown before the films.
    """

    films: dict[str, Film]
    truth: Tensor | None = None
    beside: Sequence[Panel] = ()
    slot: int | None = None
    rows: dict[str, str] = field(default_factory=dict)


def generate(settings: GenerateSettings) -> dict[str, str]:
    """Do what is asked and write it to `settings.out`; what there is to say of it.

    Raises SettingsError for what cannot be asked of this model, DataError for a clip, a record or a model that cannot
    be used, EnvironmentFault if storage or MLflow do not answer.
    """
    folder = _model_folder(settings)
    model, sha256 = load(folder), saved_sha256(folder)
    discovered = load_actions(folder)
    if discovered is not None:
        discovered.check_model(model, settings.model)
    if settings.mode in ("edit", "transfer"):
        steering.check_own_actions(model)  # before a clip is looked for
    clips = Clips(settings, model.tokenizer.config.frame_size)
    differ = 0
    if settings.mode == "replay":
        record, made, differ = _replay(settings, model, sha256, clips)
    else:
        made = _MODES[settings.mode](settings, model, clips, discovered)
        start = next(iter(made.films.values())).start
        record = Record(
            model=settings.model,
            weights_sha256=sha256,
            mode=settings.mode,
            seed=settings.seed,
            feedback=settings.feedback,
            slot=made.slot,
            source=clips.sources,
            start_frames=len(start),
            start_sha256=frames_digest(start),
            films=[record_film(label, one, discovered) for label, one in made.films.items()],
        )
    _write(settings, made, record)
    if differ:
        raise DataError(
            f"{differ} of {len(made.films)} films are not those that {settings.actions} records",
            fix=f"They come back on a processor and PyTorch of the same kind; what came instead is in {settings.out}.",
        )
    steps = len(next(iter(made.films.values())).frames)
    return {"mode": settings.mode, "steps": str(steps), **clips.sources, **made.rows, "folder": str(settings.out)}


def _model_folder(settings: GenerateSettings) -> Path:
    if settings.tracking is not None and settings.model.startswith("models:/"):
        from services.registry import download  # MLflow takes seconds, which a model in a folder need not wait for

        return download(settings.model, settings.tracking)
    return model_folder(settings.model)


def _reconstruct(settings: GenerateSettings, model: Flam, clips: Clips, _: DiscoveredActions | None) -> _Made:
    clip, steps = _long_clip(settings, clips.scene)
    found = steering.reconstruct(model, clip, settings.context, steps, feedback=settings.feedback)
    error = (found.frames.double() - clip[settings.context :].double()).square().mean() / 255**2
    rows = {"PSNR": f"{float(psnr(error.numpy())):.1f} dB over {steps} steps"}
    return _Made({"prediction": found}, clip, rows=rows)


def _edit(settings: GenerateSettings, model: Flam, clips: Clips, discovered: DiscoveredActions | None) -> _Made:
    slot, context = settings.slot, settings.context
    assert slot is not None  # the settings have seen to it
    steering.check_slot(model, slot)
    clip, steps = _long_clip(settings, clips.scene)
    beside: list[Panel] = []
    if settings.from_clip is not None:
        other = clips.other(context + steps)
        replace_by = steering.follow(steering.infer(model, other, context, steps)[context - 1 :])
        how = "acts as in the other clip"
        beside.append(Panel("the other clip", other[: context + steps].numpy()))
    elif settings.code is not None:
        vector = _codes(discovered, model, clips).vector(slot, settings.code)
        replace_by = steering.follow(vector.expand(steps, model.factors, -1))
        how = f"does code {settings.code}"
    elif settings.toward is not None:
        examples = _codes(discovered, model, clips).examples[slot]
        inferred = steering.infer(model, clip, context, steps)
        replace_by = steering.go(slot, settings.toward, examples, inferred[context - 1 :])
        how = f"goes {settings.toward}" if settings.toward != "still" else "stays where it is"
    else:
        replace_by, how = steering.prior(settings.seed), "drawn from the prior"
    plain = steering.reconstruct(model, clip, context, steps, feedback=settings.feedback)
    edited = steering.edit(model, clip, context, steps, slot, replace_by, feedback=settings.feedback)
    return _Made({"as inferred": plain, f"slot {slot}\n{how}": edited}, clip, beside, slot)


def _free(settings: GenerateSettings, model: Flam, clips: Clips, _: DiscoveredActions | None) -> _Made:
    steps = settings.steps or _STEPS
    clip = clips.scene(settings.context + steps)
    steering.check_given(clip, settings.context)
    start = clip[: settings.context]
    films = {
        f"future {i}": steering.imagine(model, start, steps, settings.seed + i, feedback=settings.feedback)
        for i in range(settings.samples or _SAMPLES)
    }
    return _Made(films, clip if len(clip) == settings.context + steps else None)


def _transfer(settings: GenerateSettings, model: Flam, clips: Clips, _: DiscoveredActions | None) -> _Made:
    other, steps = _long_clip(settings, clips.other)
    start = clips.scene(settings.context)
    found = steering.transfer(model, start, other, settings.context, steps, feedback=settings.feedback)
    beside = [Panel("the clip that\nis followed", other.numpy())]
    if model.has_slots:
        masks = model.slots(model.encode(other[None]))[1]
        assert masks is not None  # it has slots
        beside.append(masks_panel("its slots", other.numpy(), masks[0].float().numpy()))
    return _Made({"the scene that\nfollows": found}, None, beside)


def _replay(settings: GenerateSettings, model: Flam, sha256: str, clips: Clips) -> tuple[Record, _Made, int]:
    """A record and its films again, and how many of them are not the same."""
    assert settings.actions is not None  # the settings have seen to it
    record = read_record(read_bytes(resolve(settings.actions)), settings.actions)
    if settings.clip is None and settings.data is None:
        folder, slash, _ = settings.actions.rpartition("/")
        clip = _stored_frames(f"{folder}{slash}{_FRAMES_FILE}")
    else:
        clip = clips.scene(record.start_frames + len(record.films[0].actions))
    start = clip[: record.start_frames]
    record.check(sha256, start)
    films, same = {}, 0
    for one in record.films:
        films[one.label] = steering.replay(model, start, *one.tensors, feedback=record.feedback)
        same += frames_digest(films[one.label].frames) == one.frames_sha256
    clips.sources.update(record.source)
    whole = len(clip) == len(next(iter(films.values())).all_frames)
    rows = {"same frames as recorded": "yes, bit for bit"}
    return record, _Made(films, clip if whole else None, (), record.slot, rows), len(record.films) - same


_MODES = {"reconstruct": _reconstruct, "edit": _edit, "free": _free, "transfer": _transfer}


def _long_clip(settings: GenerateSettings, read: Callable[[int], Tensor]) -> tuple[Tensor, int]:
    """The clip whose actions are inferred, and the steps to take: by default as many as it allows."""
    clip = read(settings.context + (settings.steps or _STEPS))
    return clip, settings.steps or max(1, len(clip) - settings.context)


def _codes(discovered: DiscoveredActions | None, model: Flam, clips: Clips) -> DiscoveredActions:
    """Those that lie with the model; an older one has none, and they are found in the data."""
    if discovered is not None:
        return discovered
    try:
        return discover_actions(model, clips.many(_CLIPS, _FRAMES))
    except SettingsError as error:
        raise SettingsError(
            f"the model has no discovered actions beside it, and none can be found: {error.what}",
            fix="Give a data set with --data, or train the model anew.",
        ) from error


def _stored_frames(path: str) -> Tensor:
    """The given frames, and the true ones after them where they are known: uint8 [t, H, W, 3].

    Raises DataError for a file that holds none.
    """
    try:
        with np.load(io.BytesIO(read_bytes(resolve(path))), allow_pickle=False) as stored:
            frames = torch.from_numpy(stored["truth"] if "truth" in stored else stored["start"])
            if frames.ndim != 4:
                raise ValueError(f"an array of {frames.ndim} dimensions")
            return frames
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} does not hold the given frames: {error}", fix="Give the clip with --clip.") from error


def _write(settings: GenerateSettings, made: _Made, record: Record) -> None:
    """All files, the record last: it says that the rest is whole."""
    films = list(made.films.items())
    context = len(films[0][1].start)
    panels = [] if made.truth is None else [Panel("truth", made.truth.numpy())]
    panels += [*made.beside, *(Panel(label, film.all_frames.numpy()) for label, film in films)]
    last = films[-1] if made.slot is not None else films[0]
    slots = 0
    if last[1].masks is not None:
        slots = last[1].masks.shape[1]
        name = "its slots" if len(films) == 1 else f"slots of\n{last[0]}" if made.slot is None else "its mask"
        panels.append(masks_panel(name, last[1].all_frames.numpy(), last[1].masks.numpy(), made.slot))
    arrays = {f"film_{i}": film.frames.numpy() for i, (_, film) in enumerate(films)} | {"start": films[0][1].start}
    if made.truth is not None:
        arrays["truth"] = made.truth.numpy()
    frames = io.BytesIO()
    np.savez_compressed(frames, **arrays)  # pyright: ignore[reportArgumentType] - arrays by name
    out = resolve(settings.out)
    write_bytes(out / "video.mp4", film_mp4(panels, context, settings.show_fps))
    write_bytes(out / "video.gif", film_gif(panels, context, settings.show_fps))
    write_bytes(out / "strip.png", film_strip(panels, context, slots, made.slot))
    write_bytes(out / _FRAMES_FILE, frames.getvalue())
    write_bytes(out / RECORD_FILE, record.to_json().encode())
