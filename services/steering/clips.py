"""Where clips come from: files, data sets, and the data set that a registered model was trained on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flam_core.data.manifest import read_manifest
from flam_core.data.quarantine import BadClip, read_quarantine
from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.context import HeldOutClip
from flam_core.evaluation.held_out import held_out_clips
from flam_core.steering.clips import read_clip
from services.steering.settings import GenerateSettings
from services.storage import read_bytes, resolve

_SPLIT = "test"


class Clips:
    """The clips of a request, each read when it is asked for."""

    def __init__(self, settings: GenerateSettings, size: int) -> None:
        """size: of the frames that the model takes, in pixels."""
        self._settings, self._size = settings, size
        self._data = settings.data
        self.sources: dict[str, str] = {}
        """Where what was read came from."""

    def scene(self, frames: int) -> Tensor:
        """Up to `frames` frames uint8 [t, H, W, 3] of the clip that the scene is from.

        Raises DataError for a clip that cannot be read or is not there, SettingsError if nothing says which.
        """
        if self._settings.clip is not None:
            return self._read("clip", self._settings.clip, frames)
        return self._stored("clip", self._settings.clip_index)[:frames]

    def other(self, frames: int) -> Tensor:
        """The same of the clip that actions are taken from."""
        name = self._settings.from_clip
        assert name is not None  # the settings have seen to it
        if name.isdecimal():
            return self._stored("from_clip", int(name))[:frames]
        return self._read("from_clip", name, frames)

    def many(self, clips: int, frames: int) -> Tensor:
        """Up to `clips` windows uint8 [N, frames, H, W, 3] of the data set, to see what slots do in it."""
        found = self._windows(frames, clips)
        if not found:
            raise DataError(f"{self._data} has no held-out clip of {frames} frames", fix="Give another with --data.")
        return torch.from_numpy(np.stack([clip.frames for clip in found]))

    def _read(self, role: str, address: str, frames: int) -> Tensor:
        self.sources[role] = address
        if "://" not in address:
            return read_clip(Path(address), self._size, frames, self._settings.fps)
        with tempfile.TemporaryDirectory(prefix="flam-clip-") as place:  # decoders read files
            copy = Path(place, address.rpartition("/")[2])
            copy.write_bytes(read_bytes(resolve(address)))
            return read_clip(copy, self._size, frames, self._settings.fps)

    def _stored(self, role: str, number: int) -> Tensor:
        found = self._windows(None, number + 1)
        if number >= len(found):
            raise DataError(
                f"{self._data} has {len(found)} held-out clips, and number {number} is asked for",
                fix=f"Choose 0 to {len(found) - 1}." if found else "Give another data set with --data.",
            )
        self.sources[role] = f"{self._data}, {_SPLIT} clip {number}: {found[number].id}"
        return torch.tensor(found[number].frames)  # a copy: what storage gives cannot be written to

    def _windows(self, frames: int | None, limit: int) -> list[HeldOutClip]:
        if self._data is None:
            self._data = _trained_on(self._settings)
        data = resolve(self._data)
        manifest = read_manifest(data.fs, data.path)
        if manifest.frame_size != (self._size, self._size):
            height, width = manifest.frame_size
            raise SettingsError(
                f"the model takes frames of {self._size}x{self._size}, data set {data} has {height}x{width}",
                fix=f"Ingest the data with --size {self._size}, or give a file with --clip.",
            )
        quarantine = read_quarantine(data.fs, data.path)
        return held_out_clips(
            manifest, data.fs, data.path, _SPLIT, frames, limit, quarantine=quarantine, on_broken=_report
        )


def _report(clip: BadClip) -> None:
    print(f"left out: {clip}", flush=True)


def _trained_on(settings: GenerateSettings) -> str:
    """Raises SettingsError if nothing says where clips are."""
    place = ""
    if settings.model.startswith("models:/"):
        from services.registry import trained_on  # MLflow takes seconds, which a model in a folder need not wait for

        place = trained_on(settings.model, settings.tracking)
    if not place or "," in place:
        why = "was trained on several data sets" if place else "does not say which data it was trained on"
        raise SettingsError(
            f"{settings.model} {why}, and no clip is given",
            fix="Give a video or picture with --clip, or a data set with --data.",
        )
    return place
