"""The models that are served: found by address, and found anew when the alias moves."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flam_core
from flam_core.data.manifest import read_manifest
from flam_core.data.quarantine import read_quarantine
from flam_core.errors import DataError, FlamError, SettingsError
from flam_core.evaluation.held_out import held_out_clips
from flam_core.model import Flam
from flam_core.saved_model import model_folder, saved_sha256
from flam_core.steering.directions import DIRECTIONS, Examples
from flam_core.steering.discovered import DiscoveredActions, discover_actions, load_actions
from flam_core.steering.scene import Scene
from services.player.settings import PlayerSettings
from services.player.wire import Arrow, Code, ModelView, Slot
from services.registry.champion import Version
from services.registry.follow import Followed
from services.registry.versions import download, trained_on
from services.storage import resolve

_SPLIT = "test"
_REGISTRY = "models:/"
_CLIPS_TO_DISCOVER = 24
_LEAST_MOTION = 0.01
"""Share of the frame's side; less than this is no movement."""


@dataclass(frozen=True, eq=False)
class Served:
    """A model in memory, and what is known of it."""

    model: Flam
    actions: DiscoveredActions
    address: str
    version: str | None
    weights_sha256: str

    def ways(self, slot: int) -> list[Arrow]:
        """The directions that a slot was seen to take. Raises SettingsError for a slot that there is not."""
        self.actions.check_slot(slot)
        examples = self.examples(slot)
        if examples is None:
            return sorted(self.actions.arrows(slot))  # pyright: ignore[reportReturnType] - its names are these
        speed = examples.moves.norm(dim=-1)
        going = speed >= max(_LEAST_MOTION, 0.3 * float(speed.max()))
        found: list[Arrow] = []
        for name, direction in DIRECTIONS.items():
            along = examples.moves @ torch.tensor(direction) > 0.75 * speed
            if ((going & along) if any(direction) else ~going).any():
                found.append(name)  # pyright: ignore[reportArgumentType] - as above
        return found

    def examples(self, slot: int) -> Examples | None:
        """What a slot did, for `directed`; None where that is not known, or the model has no slots."""
        if not self.model.has_slots or not self.actions.examples or not len(self.actions.examples[slot].moves):
            return None
        return self.actions.examples[slot]

    def still(self, scene: Scene) -> Tensor:
        """Latent actions float32 [K, A] that leave every slot where it stands, as far as that is known."""
        places, chosen = scene.places, []
        for slot in range(self.actions.slots):
            examples = self.examples(slot)
            if places is None or examples is None:
                chosen.append(self.actions.vector(slot, self.actions.still(slot)))
            else:
                chosen.append(examples.near(places[slot], torch.zeros(2), 1)[0])
        return torch.stack(chosen)

    @property
    def exact(self) -> str:
        """Its address when the alias has moved on, too."""
        if self.version is None:
            return self.address
        return f"{_REGISTRY}{re.split('[@/]', self.address.removeprefix(_REGISTRY))[0]}/{self.version}"

    @cached_property
    def view(self) -> ModelView:
        """For the wire."""
        found = self.actions
        slots = []
        for k in range(found.slots):
            numbers = zip(*(x[k].tolist() for x in (found.motion, found.usage, found.consistency)), strict=True)
            codes = [Code(motion=motion, usage=usage, consistency=alike) for motion, usage, alike in numbers]
            slots.append(Slot(codes=codes, other=found.other(k), arrows=self.ways(k), entity=found.entity[k]))
        config = self.model.dynamics.config
        return ModelView(
            address=self.address,
            version=self.version,
            weights_sha256=self.weights_sha256,
            frame_size=self.model.tokenizer.config.frame_size,
            action_dim=config.action_dim,
            slots=slots,
        )


class ServedModel:
    """The model that an address means now. `current` may change from one call to the next; what it gave stays good."""

    def __init__(
        self, address: str, tracking: str, clips: Callable[[], list[StartClip]], device: torch.device, seed: int
    ) -> None:
        """clips: of the data set, whose size every version must have.

        Raises DataError for what is not a model, SettingsError for one without latent actions or for frames of another
        size, EnvironmentFault if MLflow does not answer.
        """
        self._followed = Followed(address, tracking) if address.startswith(_REGISTRY) else None
        self._address, self._tracking, self._clips, self._device, self._seed = address, tracking, clips, device, seed
        self.current = self._load(None if self._followed is None else self._followed.now())
        self.trouble: str | None = None
        """Why the address could not be followed at the last look; None if it could."""
        self._unfit: str | None = None
        """The version that `trouble` is about, where it cannot be used: it is not read again and again."""

    def follow(self, seconds: float) -> None:
        """From now on, look every so many seconds whether the alias has moved."""
        if self._followed is not None and self._followed.moves:
            threading.Thread(target=self._watch, args=(seconds,), name="alias", daemon=True).start()

    def look(self) -> None:
        """Look once. A version that cannot be used changes nothing but `trouble`: the one before it is served on."""
        assert self._followed is not None
        meant = None
        try:
            meant = self._followed.now()
            if meant.version == self._unfit:
                return
            self._unfit = None
            if meant.version != self.current.version:
                self.current = self._load(meant)
            self.trouble = None
        except (DataError, SettingsError) as error:
            self._unfit = None if meant is None else meant.version
            self._keep(str(error), meant)
        except FlamError as error:
            self._keep(str(error), meant)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next look may do without
            self._keep(f"{type(error).__name__}: {error}", meant)

    def _keep(self, why: str, meant: Version | None) -> None:
        new = "" if meant is None else f"version {meant.version} cannot be used, "
        self.trouble = f"{new}version {self.current.version} is served on: {why}"

    def _watch(self, seconds: float) -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            self.look()

    def _load(self, version: Version | None) -> Served:
        if version is None:
            return self._read(self._address, None)
        # In memory it needs no files: a server that follows an alias for months would fill the disk.
        with tempfile.TemporaryDirectory(prefix="flam-player-") as place:
            folder = download(version.address, self._tracking, Path(place))
            return self._read(str(folder), version.version)

    def _read(self, place: str, version: str | None) -> Served:
        model = flam_core.load(place).to(self._device)
        if model.dynamics.config.latent in ("none", "true"):
            raise SettingsError(
                f"{self._address} has no latent actions of its own to steer by",
                fix="Serve a model with gaussian or vq latent actions.",
            )
        clips = self._clips()
        check_size(self._address, model, clips)
        folder = model_folder(place)
        actions = load_actions(folder)
        if actions is None:
            several = [clip.frames for clip in clips[:_CLIPS_TO_DISCOVER]]
            shortest = min(len(frames) for frames in several)
            stacked = torch.from_numpy(np.stack([frames[:shortest] for frames in several]))
            actions = discover_actions(model, stacked, seed=self._seed)
        actions.check_model(model, self._address)
        return Served(model.eval(), actions, self._address, version, saved_sha256(folder))


def check_size(address: str, model: Flam, clips: list[StartClip]) -> None:
    """Raises SettingsError if clips are of another size than the model's frames."""
    size = model.tokenizer.config.frame_size
    height, width = clips[0].frames.shape[1:3]
    if (height, width) != (size, size):
        raise SettingsError(
            f"{address} takes frames of {size}x{size}, and the data set has {height}x{width}",
            fix=f"Give --data with frames of {size}x{size}.",
        )


@dataclass(frozen=True, eq=False)
class StartClip:
    """A held-out clip that scenes start from."""

    frames: np.ndarray
    """uint8 [T, H, W, 3]"""
    source: str
    """Where it came from, for people."""


def start_clips(settings: PlayerSettings, tracking: str) -> list[StartClip]:
    """The first held-out clips of the data set, in its order, so that a number means what `jobs/generate.py
    --clip_index` means by it. Raises DataError if it is not known where they are, or there are none."""
    place = settings.data
    if place is None and settings.model.startswith(_REGISTRY):
        place = trained_on(settings.model, tracking)
    if not place or "," in place:
        why = "was trained on several data sets" if place else "does not say what it was trained on"
        raise DataError(
            f"{settings.model} {why}, and scenes need a clip to start from",
            fix="Give --data, a data set folder or s3://bucket/prefix.",
        )
    data = resolve(place)
    manifest = read_manifest(data.fs, data.path)
    clips = held_out_clips(
        manifest,
        data.fs,
        data.path,
        _SPLIT,
        None,
        settings.scenes,
        quarantine=read_quarantine(data.fs, data.path),
        on_broken=lambda _clip: None,
    )
    if not clips:
        raise DataError(f"data set {data} has no held-out clips", fix="Give another --data, or ingest more episodes.")
    return [
        StartClip(clip.frames[: settings.clip_frames].copy(), f"{place}, {_SPLIT} clip {number}: {clip.id}")
        for number, clip in enumerate(clips)
    ]
